"""Lock file `planish.lock`: the selection with its measurements, as a small text file to review and commit.

Selecting and building are separate. A build from a lock measures nothing and gives the same bytes. The measurements
(speed-up, fidelity) are stored beside each selection as its justification.
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
    """A pass that was rolled back, with the reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    component: str
    text: str
    reason: str


class Speed(BaseModel):
    """The speed-up at one shape, measured for the selection."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: str
    speedup: float
    low: float
    high: float
    """95 % confidence interval of the speed-up over the plain lowering."""


class Trial(BaseModel):
    """An alternative pipeline or additional passes, with the decision and its reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    passes: str
    kept: bool
    why: str
    measured: list[Speed] = []


class Product(BaseModel):
    """A MatMul with a constant matrix, with the measurements before it was quantized or left in float."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    component: str
    text: str
    """The pass without its option `skip`."""
    product: str
    location: str
    noise: float
    """Relative squared error of the MatMul's output if it is quantized."""
    effect: float | None = None
    """Change of the model's outputs if it alone is quantized; None if it was not traced."""
    weights: int
    rounded: bool


class Selection(BaseModel):
    """The selection for one target."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    target: str
    opened_as: str | None = None
    """The target in the arithmetic that was chosen, where the request left it open."""
    pipelines: dict[str, str]
    """The passes of the optimized engine, by component."""
    rolled_back: list[LockedPass]
    shipped: Literal["optimized", "plain"]
    why: str
    machine: str
    """Instruction set of the machine of the measurements."""
    measured: list[Speed]
    tried: list[Trial] = []
    products: list[Product] = []
    """The MatMuls that quantization passes could quantize, by decreasing loss."""


class Lock(BaseModel):
    """The selections for every target of one source."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    source: dict[str, str]
    """SHA-256 of each file of the source; the lock is valid for this source only."""
    requested: dict[str, str]
    """The request: preset or pipeline, and the budget."""
    calibration: str = ""
    """Identity of the calibration data, if any: SHA-256 of the user's data, or their origin."""
    targets: dict[str, Selection]
    """Selections by the name of the engine's folder."""

    def text(self) -> str:
        """The content of the file."""
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
        """Raise UsageError if the engines were calibrated on other data."""
        if self.calibration and digest != self.calibration:
            raise UsageError(
                "the engines of this lock were calibrated on other data",
                where=path,
                advice="give --calibration and --samples as they were, or remove the lock to choose anew",
            )

    def check_source(self, path: Path, source: Mapping[str, str]) -> None:
        """Raise UsageError if the lock is for another source: SHA-256 of each file by its name."""
        if dict(source) != self.source:
            self.refuse_source(path)

    def refuse_source(self, path: Path) -> NoReturn:
        """Raise UsageError for a lock of another source."""
        raise UsageError("this lock was made for another source", where=path, advice=_ANEW)

    def check_request(self, path: Path, requested: Mapping[str, str], targets: list[str]) -> None:
        """Raise UsageError if the lock is for another request or set of targets."""
        if dict(requested) != self.requested:
            raise UsageError(
                f"this lock was made for {self.requested}, not for {dict(requested)}", where=path, advice=_ANEW
            )
        # Order counts: engines are written, and reported, in this order.
        if targets != [choice.target for choice in self.targets.values()]:
            raise UsageError(
                f"this lock was made for the targets {', '.join(c.target for c in self.targets.values())}, "
                f"not for {', '.join(targets)}",
                where=path,
                advice=_ANEW,
            )
