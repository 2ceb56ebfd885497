"""Options of `optimize`, one field each; the command line and the library take the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from planish.optimizer.calibration.data import Given
from planish.optimizer.compilation.job import Clock
from planish.optimizer.compilation.progress import Progress, silent
from planish.optimizer.interfaces import registry
from planish.optimizer.timing.interleaved import time_against_first


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build. `optimize` takes an instance, or the fields as keyword arguments."""

    task: str | None = None
    """The task of a checkpoint, where its configuration does not name it."""
    targets: Sequence[str] = (registry.DEFAULT_TARGET,)
    """Targets with their options: `openvino{threads=2}`."""
    preset: str | None = None
    """`exact` (used where neither a preset nor a pipeline is given), `fast` or `small`."""
    pipeline: str | None = None
    """Passes as text; excludes ``preset``."""
    calibration: Given | None = None
    """The user's own inputs: a file of texts or arrays, or an iterable of them. Engines are compared on the first,
    passes are calibrated on the next."""
    samples: int | None = None
    """Number of inputs to calibrate on; None is 256."""
    keep: Sequence[str] = ()
    """Accuracy budgets: `cosine>=0.999`."""
    evaluate: str | None = None
    """A command that gets the folder of an engine and prints a number on its last line, for budgets `score>=0.9` or,
    as a multiple of the plain engine's, `score>=0.99x`."""
    shapes: Sequence[Mapping[str, int]] = ()
    """Sizes of axes at which engines are timed."""
    fix: Mapping[str, int] | None = None
    """Sizes that axes always have: `{"sequence": 128}`."""
    expect: Sequence[str] = ()
    """How often a pass must fire on every target: `fuse-attention=12`."""
    profile: str | Path | None = None
    """The file of the tuning table: presets choose by it, and missing entries are measured and added."""
    lock: str | Path | None = None
    """Read if the file exists, written if it does not."""
    adapter: str | Path | None = None
    """The folder of a PEFT adapter that is merged into a checkpoint."""
    reference: Literal["full", "offload", "none"] = "full"
    """`offload` is for a checkpoint that does not fit into memory: its weights, and those of the engines, are read from
    their files as they are used; engines are compared with it, single passes are not, nothing is timed, and a preset
    ships the plain lowering. With `none` the original is not run and nothing is compared. The manifest says so."""
    logits: Literal["all", "last"] = "all"
    """`last`: a decoder gives the scores behind the last token only, (batch, 1, vocabulary), which is what generation
    needs, and less work for a prompt."""
    sample_inputs: Mapping[str, Any] | None = None
    """Tensors by keyword, for an `nn.Module`."""
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None
    """`{input: {position: name}}`, for an `nn.Module`."""
    progress: Progress = silent
    """Called as each stage begins."""
    clock: Clock = time_against_first
    """Times engines."""
