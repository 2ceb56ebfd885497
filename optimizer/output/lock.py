"""The choices that were made by measuring, as a small text file to review and to commit: `planish.lock`.

Choosing and building are apart. Building from a lock measures nothing and gives the same bytes; the evidence for each
choice (speed-up, fidelity) is kept beside it, so that a reader can tell why it was made.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NoReturn

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from planish.optimizer.errors import BadInput, UsageError, first_fault

LOCK = "planish.lock"
_ANEW = "remove the lock to choose anew, or give the request that it was made for"


class LockedPass(BaseModel):
    """A pass that was undone, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    component: str
    text: str
    reason: str


class Speed(BaseModel):
    """What was measured at one shape when the choice was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: str
    speedup: float
    low: float
    high: float
    """95 % confidence interval of the speed-up over the plain lowering."""


class Trial(BaseModel):
    """Passes that were tried behind the pipeline, or instead of some of it, what came of it, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    passes: str
    kept: bool
    why: str
    measured: list[Speed] = []


class Product(BaseModel):
    """A product with a constant matrix, and what was measured before it was rounded or left in float."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    component: str
    text: str
    """The pass, its products to skip left out."""
    product: str
    location: str
    noise: float
    """Squared error of its output if it is rounded, relative to the square of the output."""
    effect: float | None = None
    """Distance of the model's outputs if it alone is rounded; None if that was too much work."""
    weights: int
    rounded: bool


class Selection(BaseModel):
    """What was chosen for one target."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    target: str
    pipelines: dict[str, str]
    """The passes that are applied when the optimized engine is shipped, by component."""
    rolled_back: list[LockedPass]
    shipped: Literal["optimized", "plain"]
    why: str
    machine: str
    """Instruction set of the machine that measured."""
    measured: list[Speed]
    tried: list[Trial] = []
    products: list[Product] = []
    """What quantizing passes chose among, the dearest first."""


class Lock(BaseModel):
    """The choices for every target of one source."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    source: dict[str, str]
    """SHA-256 of each file of the source: a lock fits one source only."""
    requested: dict[str, str]
    """What was asked for: preset or pipeline, and the budget."""
    calibration: str = ""
    """What passes were calibrated on, if any were: SHA-256 of the user's data, else how the data were made."""
    targets: dict[str, Selection]
    """By the name of the engine's folder."""

    def text(self) -> str:
        """The file's content."""
        return tomli_w.dumps(self.model_dump(exclude_none=True), multiline_strings=False)

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock; BadInput if it cannot be read."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadInput(f"this lock cannot be read ({error})", where=path) from error
        except ValidationError as error:
            raise BadInput(first_fault(error), where=path) from None

    def check_data(self, path: Path, digest: str) -> None:
        """UsageError if engines were calibrated on other data than these."""
        if self.calibration and digest != self.calibration:
            raise UsageError(
                "the engines of this lock were calibrated on other data",
                where=path,
                advice="give --calibration and --samples as they were, or remove the lock to choose anew",
            )

    def check_source(self, path: Path, source: Mapping[str, str]) -> None:
        """UsageError if the lock was made for another source: SHA-256 of each file by its name."""
        if dict(source) != self.source:
            self.refuse_source(path)

    def refuse_source(self, path: Path) -> NoReturn:
        """UsageError: the lock was made for another source."""
        raise UsageError("this lock was made for another source", where=path, advice=_ANEW)

    def check_request(self, path: Path, requested: Mapping[str, str], targets: list[str]) -> None:
        """UsageError if the lock was made for another request or set of targets."""
        if dict(requested) != self.requested:
            raise UsageError(
                f"this lock was made for {self.requested}, not for {dict(requested)}", where=path, advice=_ANEW
            )
        if targets != [choice.target for choice in self.targets.values()]:
            raise UsageError(
                f"this lock was made for the targets {', '.join(c.target for c in self.targets.values())}, "
                f"not for {', '.join(targets)}",
                where=path,
                advice=_ANEW,
            )
