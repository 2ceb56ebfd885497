"""The backend under test, and what all checks do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

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
        with unchanged(program, "emit()"):
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


@contextmanager
def unchanged(program: Program, method: str) -> Iterator[None]:
    """CheckFailed if the block, a call of ``method``, changes a program: it is emitted for other targets afterwards."""
    before = _contents(program)
    yield
    changed = [name for name, content in _contents(program).items() if content != before.get(name)]
    demand(not changed, f"{method} changes the program that it is given ({', '.join(changed)})", "change a clone of it")


def _contents(program: Program) -> dict[str, object]:
    """The content of a program, by component, comparable with its content later."""
    graphs = {
        name: ir.to_proto(model).SerializeToString(deterministic=True) for name, model in program.components.items()
    }
    return {"components": sorted(graphs), "signatures": repr(program.signatures), **graphs}
