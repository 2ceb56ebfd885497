"""The original with its weights left in the checkpoint: each is read when the model's code asks for it, then dropped.

Parameters stay on the meta device. What a module hands out when its `weight` is asked for is read from the safetensors
files at that moment, merged with an adapter or converted as its reference says, in the type that the parameter has;
when the last user lets go of it, it is gone. So a weight is there however it is used: by its own module's forward
method, by another module's, or tied.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint, bind, initial, skeleton
from planish.optimizer.lowering.checkpoint.weights import Stored, Weight
from planish.optimizer.lowering.original.lockstep import Turnstile


def offloaded(checkpoint: Checkpoint) -> Any:
    """The model in float32, without its weights in memory: it computes what `checkpoint.loaded` computes."""
    model = skeleton(checkpoint, experts=None)
    binding = bind(model, checkpoint)
    model.weight_reader = reader = Reader(model, binding.stored, binding.absent)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        module._parameters = Weights(module._parameters, prefix, reader)
        for name, buffer in module._buffers.items():
            stored = binding.stored.get(prefix + name)
            if buffer is not None and stored is not None:
                module._buffers[name] = _values(stored, buffer)
    return model


class Weights(dict[str, Any]):
    """The parameters of one module: they are listed as they are on the meta device, and read when one is asked for."""

    def __init__(self, parameters: Mapping[str, Any], prefix: str, reader: Reader) -> None:
        super().__init__(parameters)
        self._prefix = prefix
        self._reader = reader

    def __getitem__(self, name: str) -> Any:
        """The parameter with its values, in the type of the one on the meta device."""
        listed = super().__getitem__(name)
        return listed if listed is None or not listed.is_meta else self._reader.read(self._prefix + name, listed)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """A copy of the module is one without values."""
        return copy.deepcopy(dict(self.items()), memo)


class Reader:
    """Reads weights by the names of parameters. One that somebody still holds is handed out again."""

    def __init__(self, model: Any, stored: Mapping[str, Weight], absent: frozenset[str]) -> None:
        self._model = model
        self._stored = stored
        self._absent = absent
        self._held: weakref.WeakValueDictionary[tuple[str, Any], Any] = weakref.WeakValueDictionary()
        self._last: Any = None
        """Kept until another is read: for the next call, and many modules ask for the type of a weight first."""
        self.turnstile = Turnstile()

    def read(self, name: str, listed: Any) -> Any:
        """The parameter ``name`` in the shape and type of ``listed``."""
        import torch

        if (name, listed.dtype) not in self._held:
            self.turnstile.wait_for((name, listed.dtype))
        found = self._held.get((name, listed.dtype))
        if found is None:
            self._last = None  # before there is another
            found = torch.nn.Parameter(self._make(name, listed), requires_grad=False)
            self._held[name, listed.dtype] = found
        self._last = found
        return found

    def _make(self, name: str, listed: Any) -> Any:
        """NaN for what the checkpoint lacks: lowering refuses outputs that depend on it."""
        import torch

        if name in self._stored:
            return _values(self._stored[name], listed)
        if name in self._absent:
            return torch.full(listed.shape, torch.nan, dtype=listed.dtype)
        return initial(self._model, name).to(listed.dtype)


def _values(stored: Weight, like: Any) -> Any:
    """A stored tensor: a view of the mapped file if nothing changes, as transformers has it, else in torch's memory.

    Where a tensor lies decides how its kernels round: they have other paths for other alignments.
    """
    import torch

    if isinstance(stored, Stored) and stored.dtype is stored.stored:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # nobody writes to it
            view = torch.from_numpy(stored.read())
        if view.dtype is like.dtype:
            return view
    made = torch.empty(like.shape, dtype=like.dtype)
    stored.read_into(made.numpy())
    return made
