"""Parameters that transformers computes from several stored tensors: computed when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planish.optimizer.lowering.checkpoint.weights import Weight

Part = tuple[str, str, Weight]
"""An input of a conversion rule: the matched pattern, the name in the file, the stored tensor."""


@dataclass(frozen=True)
class Converted(Weight):
    """The result of a conversion rule of transformers for several stored tensors."""

    whole: tuple[int, ...]
    name: str
    """The parameter; a rule may compute several."""
    target: str
    """The name under which transformers collects the inputs."""
    parts: tuple[Part, ...]
    rule: Any = field(repr=False, compare=False)
    model: Any = field(repr=False, compare=False)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.whole

    def read(self) -> np.ndarray:
        """The parameter in float32 with permuted axes."""
        import torch

        tensors = [(pattern, key, torch.from_numpy(np.array(part.read()))) for pattern, key, part in self.parts]
        result: np.ndarray = apply(self.rule, self.model, self.target, tensors)[self.name].numpy()
        return np.ascontiguousarray(result.transpose(self.order))


def convert(rule: Any, model: Any, target: str, parts: Sequence[Part]) -> dict[str, Converted]:
    """Lazy weights by parameter name. Tensors without data determine the parameters and shapes of a rule."""
    import torch

    shapes = [(pattern, key, torch.empty(part.stored_shape, device="meta")) for pattern, key, part in parts]
    return {
        name: Converted(tuple(tensor.shape), name, target, tuple(parts), rule, model)
        for name, tensor in apply(rule, model, target, shapes).items()
    }


def apply(rule: Any, model: Any, target: str, parts: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """Tensors by parameter name, computed by transformers from (pattern, key, tensor)."""
    fresh = deepcopy(rule)  # it collects what it is given
    for pattern, key, tensor in parts:
        fresh.add_tensor(target, key, pattern, tensor)
    converted = fresh.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
