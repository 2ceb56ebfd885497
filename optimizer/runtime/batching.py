"""Batches of the sizes that an engine takes: grouped, filled up, padded and cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from planish.optimizer.ir.program import Axis, Signature, leading_axis

T = TypeVar("T")


@dataclass(frozen=True)
class BatchLimits:
    """The number of texts that an engine takes at once, and the number of tokens that each may have."""

    texts: Axis = field(default_factory=lambda: Axis("batch"))
    tokens: Axis = field(default_factory=lambda: Axis("sequence"))

    @classmethod
    def of(cls, signature: Signature) -> BatchLimits:
        """The limits of the component that takes texts."""
        axes, unlimited = signature.axes, cls()
        texts = axes.get(leading_axis(signature) or "", unlimited.texts)
        return cls(texts, axes.get("sequence", unlimited.tokens))

    def padding(self, longest: int | None) -> dict[str, Any]:
        """Options of a tokenizer that pads to the longest text, or to the length that an engine needs.

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
        """Batches of as many items as the engine takes at once."""
        most = self.texts.maximum or max(1, len(items))
        return (items[start : start + most] for start in range(0, len(items), most))

    def filled(self, items: Sequence[T]) -> list[T]:
        """The items, the last one repeated until there are as many as the engine needs."""
        return [*items, *[items[-1]] * (self.texts.minimum - len(items))]

    def rows(self, array: np.ndarray) -> np.ndarray:
        """An array whose first axis counts the items, its last row repeated in the same way."""
        return array[self.filled(range(len(array)))]
