"""The backend under test, and what all checks do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.errors import CheckFailed, MissingRuntime
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.interfaces.backend import Backend, Engine
from planish.optimizer.ir.program import Program


class NotApplicable(Exception):
    """The reason why a check says nothing about a backend here, such as a runtime that is not installed."""


@dataclass(frozen=True)
class Subject:
    """A backend with its options, a folder to write to, and the budget of its outputs."""

    backend: Backend
    folder: Path
    budget: Budget

    def emitted(self, program: Program, name: str = "engine") -> Path:
        """A folder with the engine of a program."""
        place = self.folder / name
        place.mkdir()
        self.backend.emit(program, place)
        return place

    def opened(self, place: Path) -> Engine:
        """The engine in a folder; NotApplicable if its runtime or device is not here."""
        self.demand_runtime()
        try:
            return self.backend.open(place)
        except MissingRuntime as error:
            raise NotApplicable(str(error)) from error

    def engine(self, program: Program) -> Engine:
        """An engine of a program."""
        self.demand_runtime()
        return self.opened(self.emitted(program))

    def demand_runtime(self) -> None:
        """NotApplicable if no engine can be opened here."""
        reason = self.backend.missing()
        if reason is not None:
            raise NotApplicable(reason)


Check = Callable[[Subject], None]


def demand(holds: bool, otherwise: str, advice: str | None = None) -> None:
    """CheckFailed with the text ``otherwise`` if something does not hold."""
    if not holds:
        raise CheckFailed(otherwise, advice=advice)
