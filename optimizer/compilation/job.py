"""One build: what was asked for, the lowered source, and everything that engines of all targets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from planish.optimizer.calibration.data import Samples
from planish.optimizer.compilation.progress import Stages
from planish.optimizer.compilation.request import Request
from planish.optimizer.fidelity.reference import References
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.ir.program import Arrays, Program
from planish.optimizer.lowering import Lowered
from planish.optimizer.output.sites import Expectation
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import Timing

Clock = Callable[[Sequence[EngineRef], Sequence[Arrays]], list[Timing]]
"""Times engines on their inputs in alternation, the first as the baseline of the others."""


class Checks(StrEnum):
    """How far the original is run, and with it what can be checked and timed."""

    FULL = "full"
    """Passes and engines are compared with the original, and engines are timed."""
    OFFLOAD = "offload"
    """Weights stay in their files: engines are compared with the original, passes are not, nothing is timed."""
    NONE = "none"
    """The original is not run: nothing is compared or timed."""


@dataclass(frozen=True)
class Places:
    """Folders of a build."""

    engines: Path
    """The output: each target gets a folder in it."""
    scratch: Path
    reproducers: Path
    """Models and commands that reproduce a failed pass."""


@dataclass(frozen=True)
class Job:
    """The inputs of `build_engine` that are the same for every target."""

    request: Request
    lowered: Lowered
    checks: Checks
    references: Callable[[], References] | None
    """Waits for the reference outputs; None if the original is not run."""
    inputs: Mapping[str, Sequence[Arrays]]
    """Reference inputs by component."""
    batches: Mapping[str, Callable[[], Iterable[Arrays]]]
    """Calibration data by component."""
    data: Samples | None
    """The user's own inputs."""
    expected: Sequence[Expectation]
    """How often passes must fire and operators must occur, whatever is shipped."""
    libraries: Mapping[str, str]
    """Versions of the libraries that decide what comes out, for the manifest."""
    places: Places
    stages: Stages
    clock: Clock

    @property
    def program(self) -> Program:
        """The plain lowering."""
        return self.lowered.program

    def may_time(self, target: Backend) -> bool:
        """True if engines of ``target`` can be timed on this machine."""
        return self.checks is Checks.FULL and target.missing() is None
