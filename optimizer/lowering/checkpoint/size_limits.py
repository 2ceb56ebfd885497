"""How much a configuration may ask for, given what the weights hold: a kilobyte must not take the machine.

config.json may ask for a million layers, and building them takes hours and all memory before anybody compares them with
the weights. But each layer has weights of its own, and the headers of the files tell how many there are. So modules
are built under a bound that follows from them.
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
"""Settings that count what has weights of its own, or rows of a weight."""
_PIECES = 4
"""Parameters that may be made of one stored tensor: queries, keys and values of one, and one to spare."""
_OTHERS = 1000
"""Parameters that need not be stored: heads, tables."""
_TABLE = 1 << 30
"""Bytes of a buffer that is computed: masks of 32,768 tokens fit."""
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")


def check_counts(raw: Mapping[str, Any], weights: Mapping[str, Weight], path: Path) -> None:
    """BadInput if the configuration counts more of anything than the weights hold: lists are made of these numbers."""
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
    """Inside, BadInput as soon as a module has more parameters, or a larger buffer, than fits to the weights."""
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
    """Looks at what is allocated before it is: tensors without data tell how large one would be."""
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
