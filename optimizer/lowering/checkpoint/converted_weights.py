"""Parameters that transformers computes from several stored tensors: computed when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planish.optimizer.lowering.checkpoint.weights import Weight

Part = tuple[str, str, Weight]
"""A stored tensor that a rule takes: the pattern of the rule that it matched, its name in the file, its place."""


@dataclass(frozen=True)
class Converted(Weight):
    """What a rule of transformers makes of several stored tensors."""

    whole: tuple[int, ...]
    name: str
    """The parameter; a rule may make several."""
    target: str
    """The name that transformers files the parts under."""
    parts: tuple[Part, ...]
    rule: Any = field(repr=False, compare=False)
    model: Any = field(repr=False, compare=False)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.whole

    def read(self) -> np.ndarray:
        """The parameter in float32, in the order of its permutation."""
        import torch

        tensors = [(pattern, key, torch.from_numpy(np.array(part.read()))) for pattern, key, part in self.parts]
        found: np.ndarray = apply(self.rule, self.model, self.target, tensors)[self.name].numpy()
        return np.ascontiguousarray(found.transpose(self.order))


def convert(rule: Any, model: Any, target: str, parts: Sequence[Part]) -> dict[str, Converted]:
    """Recipes by parameter name. Which parameters a rule makes, and of what shape, tensors without data show."""
    import torch

    shapes = [(pattern, key, torch.empty(part.stored_shape, device="meta")) for pattern, key, part in parts]
    return {
        name: Converted(tuple(tensor.shape), name, target, tuple(parts), rule, model)
        for name, tensor in apply(rule, model, target, shapes).items()
    }


def apply(rule: Any, model: Any, target: str, parts: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """Tensors by parameter name, as transformers makes them of (pattern, key, tensor)."""
    fresh = deepcopy(rule)  # it collects what it is given
    for pattern, key, tensor in parts:
        fresh.add_tensor(target, key, pattern, tensor)
    made = fresh.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
