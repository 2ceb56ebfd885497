"""Lock file `planish.lock`: the selection with its measurements, as a small text file to review and commit.

Selecting and building are separate. A build from a lock measures nothing and gives the same bytes. The measurements
(speed-up, fidelity) are stored beside each selection as its justification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from planish.optimizer.errors import BadInput, UsageError, first_fault
from planish.optimizer.pipeline.pipeline import Pipeline
from planish.optimizer.system.json_files import read_toml

LOCK = "planish.lock"
_ANEW = "remove the lock to choose anew, or give the request that it was made for"
_MOST_WEIGHTS = 1 << 40
"""Upper bound of the elements of a matrix; a larger one does not fit any memory."""


def _not_negative(value: float) -> float:
    if value < 0:
        raise ValueError(f"{value} is negative")
    return value


Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Noise = Annotated[float, AfterValidator(_not_negative)]  # not finite where float32 overflows


class LockRecord(BaseModel):
    """Base of all tables of a lock. People edit locks: unknown names and other types than the declared are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LockedPass(LockRecord):
    """A pass that was rolled back, with the reason."""

    component: str
    text: str
    reason: str


class Speed(LockRecord):
    """The speed-up at one shape, measured for the selection."""

    shape: str
    speedup: Factor
    low: Factor
    high: Factor
    """95 % confidence interval of the speed-up over the plain lowering."""


class Trial(LockRecord):
    """An alternative pipeline or additional passes, with the decision and its reason."""

    passes: str
    kept: bool
    why: str
    raced: bool = True
    """False if it took no part, for want of calibration data."""
    measured: list[Speed] = []


class Product(LockRecord):
    """A MatMul with a constant matrix, with the measurements before it was quantized or left in float."""

    component: str
    text: str
    """The pass without its option `skip`."""
    product: str
    location: str
    noise: Noise
    """Relative squared error of the MatMul's output if it is quantized."""
    effect: float | None = None
    """Change of the model's outputs if it alone is quantized; None if it was not traced. Rounding may leave the
    divergence of equal scores slightly below zero."""
    weights: Annotated[int, Field(ge=0, le=_MOST_WEIGHTS)]
    rounded: bool


class Selection(LockRecord):
    """The selection for one target."""

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


class Lock(LockRecord):
    """The selections for every target of one source."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    source: dict[str, str]
    """SHA-256 of each file of the source; the lock is valid for this source only."""
    requested: dict[str, str]
    """The request: preset or pipeline, and the budget."""
    calibration: str = ""
    """Identity of the calibration data, if any: SHA-256 of the user's data, or their origin."""
    targets: Annotated[dict[str, Selection], Field(min_length=1)]
    """Selections by the name of the engine's folder, which is the name of the target."""

    @model_validator(mode="after")
    def _named_by_target(self) -> Self:
        for name, selection in self.targets.items():
            if selection.target.partition("{")[0] != name:
                raise ValueError(f"targets.{name} is a selection for {selection.target!r}")
        return self

    def text(self) -> str:
        """The content of the file."""
        return tomli_w.dumps(self.model_dump(exclude_none=True), multiline_strings=False)

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock; BadInput if it cannot be read."""
        try:
            return cls.model_validate(read_toml(path))
        except OSError as error:
            raise BadInput(f"this lock cannot be read ({error.strerror})", where=path) from error
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
        for name in sorted(source.keys() | self.source.keys()):
            if source.get(name) != self.source.get(name):
                how = "is missing" if name not in source else "is not in the lock" if name not in self.source else ""
                self.refuse_source(path, f"{name} {how or 'has changed'}")

    def refuse_source(self, path: Path, difference: str) -> NoReturn:
        """Raise UsageError for a lock of another source, with the file that differs."""
        raise UsageError(f"this lock was made for another source: {difference}", where=path, advice=_ANEW)

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

    def check_pipelines(self, path: Path) -> None:
        """Raise BadInput for a target without pipelines, or a pipeline that cannot be parsed, with its component."""
        for target, selection in self.targets.items():
            if not selection.pipelines:
                raise BadInput("there is no pipeline here", where=f"{path}, targets.{target}.pipelines", advice=_ANEW)
            for component, text in selection.pipelines.items():
                with located(f"{path}, targets.{target}.pipelines.{component}"):
                    Pipeline.parse(text)

    def check_components(self, path: Path, components: Iterable[str]) -> None:
        """Raise BadInput if a target has a pipeline for other components than the source has."""
        names = list(components)
        for target, selection in self.targets.items():
            if selection.pipelines.keys() != set(names):
                raise BadInput(
                    f"it has pipelines for {', '.join(selection.pipelines)}, and the source has {', '.join(names)}",
                    where=f"{path}, targets.{target}.pipelines",
                    advice=_ANEW,
                )


@contextmanager
def located(where: str) -> Iterator[None]:
    """Turn errors of the request into BadInput of the place in a lock where the text stands."""
    try:
        yield
    except (UsageError, BadInput) as error:
        raise BadInput(error.what, where=where, advice=error.advice or _ANEW, picture=error.picture) from error
