"""Options of `optimize`, one field each; the command line and the library take the same."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictStr, TypeAdapter, ValidationError

from planish.optimizer.calibration.data import Given
from planish.optimizer.compilation.job import Clock
from planish.optimizer.compilation.progress import Progress, silent
from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.timing.interleaved import time_against_first


def _integer(value: Any) -> int:
    """An integer as Python's own: sizes often come from NumPy. True is none."""
    if isinstance(value, bool):
        raise ValueError("True and False are no integers")
    try:
        return operator.index(value)
    except TypeError as error:  # pydantic turns a ValueError into a fault of the option
        raise ValueError(str(error)) from error


def _several(value: Any) -> Any:
    """A single text, which is a sequence of letters, as a list of one."""
    return (value,) if isinstance(value, str) else value


def _path(value: str | Path) -> str | Path:
    if "\0" in os.fspath(value):
        raise ValueError("no path has a null character")
    return value


def _inputs(value: Any) -> Any:
    """Calibration data, untouched: an iterable may be readable once only. A mapping would be read as its keys."""
    iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if isinstance(value, bytes | Mapping) or not (iterable or isinstance(value, Path)):
        raise ValueError("neither a path nor inputs")
    return value


def _tensors(value: Any) -> Any:
    """Inputs of a module, untouched: tokenizers give mappings of their own classes."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("no tensors by keyword")
    return value


_Integer = Annotated[int, BeforeValidator(_integer)]
_Sizes = dict[StrictStr, Annotated[_Integer, Field(ge=0)]]
_TEXT, _PATH = TypeAdapter(StrictStr), TypeAdapter(Annotated[StrictStr | Path, AfterValidator(_path)])
_TEXTS: TypeAdapter[Any] = TypeAdapter(Annotated[tuple[StrictStr, ...], BeforeValidator(_several)])
_FUNCTION: TypeAdapter[Any] = TypeAdapter(Callable[..., Any])
_ACCEPTED: Mapping[str, tuple[TypeAdapter[Any], str]] = {
    "task": (_TEXT, "a text"),
    "targets": (_TEXTS, "a text or a list of texts"),
    "preset": (_TEXT, "a text"),
    "pipeline": (_TEXT, "a text"),
    "calibration": (TypeAdapter(Annotated[Any, AfterValidator(_inputs)]), "a path, or texts or arrays by input name"),
    "samples": (TypeAdapter(Annotated[_Integer, Field(ge=1)]), "an integer of at least 1"),
    "keep": (_TEXTS, "a text or a list of texts"),
    "evaluate": (_TEXT, "a text"),
    "shapes": (TypeAdapter(tuple[_Sizes, ...]), 'a list of sizes by axis, [{"batch": 1, "sequence": 128}]'),
    "fix": (TypeAdapter(_Sizes), 'sizes by axis, {"sequence": 128}'),
    "expect": (_TEXTS, "a text or a list of texts"),
    "profile": (_PATH, "a path"),
    "lock": (_PATH, "a path"),
    "depfile": (_PATH, "a path"),
    "adapter": (_PATH, "a path"),
    "reference": (TypeAdapter(Literal["full", "offload", "none"]), "'full', 'offload' or 'none'"),
    "logits": (TypeAdapter(Literal["all", "last"]), "'all' or 'last'"),
    "sample_inputs": (TypeAdapter(Annotated[Any, AfterValidator(_tensors)]), "tensors by keyword"),
    "dynamic_axes": (
        TypeAdapter(dict[StrictStr, dict[_Integer, StrictStr]]),
        'names of axes by input and position, {"x": {0: "batch"}}',
    ),
    "roofline": (TypeAdapter(StrictBool), "True or False"),
    "progress": (_FUNCTION, "a function"),
    "clock": (_FUNCTION, "a function"),
}
"""Type of each option, besides None where that is its default, and its words in a message."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build. `optimize` takes an instance, or the fields as keyword arguments.

    UsageError for a value of another type than the option takes. A single text is taken as a sequence of one.
    """

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
    depfile: str | Path | None = None
    """The file to write the list of files into that were read, as a rule for make and ninja."""
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
    roofline: bool = False
    """Measure how far each operator of the engines is from what this machine can do, for `measurements.json` and the
    report."""
    progress: Progress = silent
    """Called as each stage begins."""
    clock: Clock = time_against_first
    """Times engines."""

    def __post_init__(self) -> None:
        """Check the type of every option, and keep its value in the form that the annotation says."""
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None and option.default is None:
                continue
            adapter, kind = _ACCEPTED[option.name]
            try:
                checked = adapter.validate_python(value)
            except ValidationError:
                raise UsageError(
                    f"this takes {kind}, not {reprlib.repr(value)}", where=f"option {option.name}"
                ) from None
            object.__setattr__(self, option.name, checked)  # the instance is frozen for everybody else
