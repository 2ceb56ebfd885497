"""Texts fitted to the sizes that an engine takes: no more of them at once, no fewer, none longer, none shorter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from planish.optimizer.ir.program import Axis, Signature, leading_axis

T = TypeVar("T")


@dataclass(frozen=True)
class BatchLimits:
    """How many texts an engine takes at once, and how many tokens each may have."""

    texts: Axis = field(default_factory=lambda: Axis("batch"))
    tokens: Axis = field(default_factory=lambda: Axis("sequence"))

    @classmethod
    def of(cls, signature: Signature) -> BatchLimits:
        """The room of the component that takes texts."""
        axes, free = signature.axes, cls()
        return cls(axes.get(leading_axis(signature) or "", free.texts), axes.get("sequence", free.tokens))

    def padding(self, longest: int | None) -> dict[str, Any]:
        """Options of a tokenizer that pads to the longest text, or to the length that an engine insists on.

        ``longest`` is the most tokens of one text; longer ones are cut.
        """
        least = self.tokens.minimum
        return {
            "padding": "max_length" if least > 1 else True,
            "truncation": longest is not None,
            "max_length": least if longest is None and least > 1 else longest,
            "return_tensors": "np",
        }

    def groups(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """As many at once as the engine takes."""
        most = self.texts.maximum or max(1, len(items))
        return (items[start : start + most] for start in range(0, len(items), most))

    def filled(self, items: Sequence[T]) -> list[T]:
        """The last one repeated until there are as many as the engine insists on."""
        return [*items, *[items[-1]] * (self.texts.minimum - len(items))]

    def rows(self, array: np.ndarray) -> np.ndarray:
        """The same with an array, whose first axis counts the items."""
        return array[self.filled(range(len(array)))]
