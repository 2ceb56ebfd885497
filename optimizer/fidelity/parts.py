"""Values of the parts of an engine that are compared: each component, and what holds for all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

Value = TypeVar("Value")

_CONTINUATIONS, _EVALUATION = "generation", "own measure"
"""How files and messages name the two; no component has such a name."""


@dataclass(frozen=True)
class Parts(Generic[Value]):
    """One value, a comparison or a budget, for each part."""

    components: Mapping[str, Value]
    continuations: Value | None = None
    """Of the texts that an engine writes; None if it writes none."""
    evaluation: Value | None = None
    """Of the user's own metric; None if there is none."""

    def by_name(self) -> dict[str, Value]:
        """The values by the names that files and messages use."""
        together = {_CONTINUATIONS: self.continuations, _EVALUATION: self.evaluation}
        return {**self.components, **{name: value for name, value in together.items() if value is not None}}

    @classmethod
    def of_names(cls, values: Mapping[str, Value]) -> Self:
        """The parts of values that a file holds by name."""
        components = {name: value for name, value in values.items() if name not in (_CONTINUATIONS, _EVALUATION)}
        return cls(components, values.get(_CONTINUATIONS), values.get(_EVALUATION))
