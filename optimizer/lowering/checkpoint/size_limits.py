"""Limits on the model that a configuration describes, derived from the weights: a small file must not exhaust memory.

config.json may ask for a million layers; building them takes hours and all memory, before any comparison with the
weights. Each layer has its own weights, whose number is in the headers of the files. Modules are therefore built under
limits that follow from the headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.checkpoint.weights import Weight

_COUNTS = re.compile(r"(^|_)(layers?|blocks|heads?|labels|experts|stages|depths?)$")
"""Settings that count layers or rows, each with weights of its own."""
_PIECES = 4
"""Maximum number of parameters per stored tensor: queries, keys and values from one, and one in reserve."""
_OTHERS = 1000
"""Maximum number of parameters that need not be stored: heads, tables."""
_TABLE = 1 << 30
"""Maximum bytes of a computed buffer: masks of 32,768 tokens fit."""
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")


def check_counts(raw: Mapping[str, Any], weights: Mapping[str, Weight], path: Path) -> None:
    """Raise BadInput if a count in the configuration exceeds the weights; lists of that length would be built."""
    sizes = (size for weight in weights.values() for size in weight.stored_shape)
    most = max(_PIECES * len(weights) + _OTHERS, max(sizes, default=0))
    parts: list[Any] = [raw]
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, dict | list):
                parts.append(value)
            elif isinstance(value, int) and value > most and _COUNTS.search(str(key)):
                raise _too_many(f"{value} {key}", weights, path)


@contextmanager
def bounded(weights: Mapping[str, Weight], path: Path) -> Iterator[None]:
    """Raise BadInput in the block when a module exceeds the number of parameters, or the buffer size, of the
    weights."""
    import torch

    most = _PIECES * len(weights) + _OTHERS
    count = 0
    register = torch.nn.Module.register_parameter

    def counted(module: Any, name: str, param: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _too_many(f"more than {most} parameters", weights, path)
        register(module, name, param)

    torch.nn.Module.register_parameter = counted  # type: ignore[method-assign, assignment]
    try:
        with _small_tables(weights, path):
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _small_tables(weights: Mapping[str, Weight], path: Path) -> Any:
    """Mode that checks the size of tensors before their allocation, using tensors without data."""
    import torch
    from torch.overrides import TorchFunctionMode

    held = sum(4 * math.prod(weight.stored_shape) for weight in weights.values())
    factories = {getattr(torch, name) for name in _FACTORIES}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = kwargs or {}
            if function in factories and "out" not in options:
                size = function(*args, **{**options, "device": "meta"}).nbytes
                if size > max(_TABLE, held):
                    raise _too_many(f"a table of {size / 1e9:.1f} GB", weights, path)
            return function(*args, **options)

    return Watch()


def _too_many(what: str, weights: Mapping[str, Weight], path: Path) -> BadInput:
    return BadInput(
        f"it asks for {what}, and the weights are {len(weights)} tensors",
        where=path,
        advice="config.json and the weights are of different models",
    )
