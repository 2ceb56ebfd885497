"""Parameters that transformers computes from several stored tensors, experts above all: computed when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.lowering.weights import Stored

Part = tuple[str, str, Stored]
"""A stored tensor that a rule takes: the pattern of the rule that it matched, its name in the file, its place."""


@dataclass(frozen=True, kw_only=True)
class Converted(Stored):
    """What a rule of transformers makes of several stored tensors, or a piece of one."""

    name: str
    """The parameter; a rule may make several."""
    parts: tuple[Part, ...]
    rule: Any = field(repr=False, compare=False)
    model: Any = field(repr=False, compare=False)

    def read(self) -> np.ndarray:
        """The parameter in float32, in the order of its permutation."""
        made = _apply(self.rule, self.model, self.name, [(*where, _tensor(stored)) for *where, stored in self.parts])
        found: np.ndarray = made[self.name].numpy()
        return found if self.permutation is None else np.ascontiguousarray(found.transpose(self.permutation))

    def read_into(self, found: np.ndarray) -> None:
        """Write it into an array of its shape."""
        found[...] = self.read()


def convert(collected: Mapping[str, Sequence[Part]], rules: Mapping[str, Any], model: Any) -> dict[str, Converted]:
    """Recipes by parameter name; ``collected`` are the parts of each by the name that transformers files them under.

    ``rules`` are the conversions of transformers by source pattern. Which parameters one makes, and of what shape, is
    seen by applying it to tensors without data.
    """
    import torch

    found: dict[str, Converted] = {}
    for name, unsorted in collected.items():
        parts = tuple(sorted(unsorted, key=lambda part: _natural(part[1])))
        rule, first = rules[parts[0][0]], parts[0][2]
        shapes = [(*where, torch.empty(stored.stored_shape, device="meta")) for *where, stored in parts]
        for target, tensor in _apply(rule, model, name, shapes).items():
            found[target] = Converted(
                first.path, first.offset, ir.DataType.FLOAT, tuple(tensor.shape), ir.DataType.FLOAT,
                name=target, parts=parts, rule=rule, model=model,
            )  # fmt: skip
    return found


def _apply(rule: Any, model: Any, name: str, parts: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Tensors by parameter name, as transformers makes them of (pattern, key, tensor)."""
    fresh = deepcopy(rule)  # it collects what it is given
    for pattern, key, tensor in parts:
        fresh.add_tensor(name, key, pattern, tensor)
    made = fresh.convert(name, model=model, config=model.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _tensor(stored: Stored) -> Any:
    import torch

    return torch.from_numpy(np.array(stored.widened().read()))


def _natural(key: str) -> Any:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(key)
