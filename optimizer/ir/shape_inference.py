"""The standard's type and shape inference on graphs that nobody vouches for: silent, and in bounded memory."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common

_LIBRARIES = ("onnx_ir", "onnxscript")
_MOST_ENTRIES = 1 << 16
"""Integers of one value that are followed: shapes are shorter by far."""
_LONGEST_SHAPE = 64
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings and tracebacks of onnx_ir and onnxscript from standard error: ours is the only voice there.

    What they fail at and say so, they leave as it was.
    """
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def infer_shapes(model: ir.Model) -> None:
    """Write down what shapes can be inferred; a graph that inference refuses stays as it is."""
    with quiet_libraries():
        common.ShapeInferencePass(data_prop=follows_few(model))(model)


def follows_few(model: ir.Model) -> bool:
    """Whether inference may follow the values of integers as well (data propagation).

    It holds each of them as a message (140 bytes in onnx 1.23), also those of a vector of which it knows the length
    alone: 34 Concats that double a shape, or one Range of constants, would take all memory.
    """
    counts: dict[int, int] = {}
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        counts.update((id(value), _vector_length(value)) for value in graph.inputs)
        for node in graph:
            read = [counts.get(id(value), _count_of(value)) for value in node.inputs]
            count = max(sum(read) if node.op_type == "Concat" else max(read, default=1), _generated(node, read))
            if count > _MOST_ENTRIES:
                return False
            counts.update((id(value), count) for value in node.outputs)
    return all(count <= _MOST_ENTRIES for count in counts.values())


def _vector_length(value: ir.Value) -> int:
    sizes = [] if value.shape is None or value.dtype not in _INTEGERS else list(value.shape)
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else 1


def _count_of(value: ir.Value | None) -> int:
    """Integers of a constant vector; 1 of what is no constant, or is no vector and bounded by the size of the file."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return 1 if tensor is None or tensor.dtype not in _INTEGERS or len(tensor.shape) > 1 else tensor.size


def _generated(node: ir.Node, read: Sequence[int]) -> int:
    """Entries of the result of an operator whose constants say how many it makes of few."""
    numbers = [_integers(value) for value in node.inputs]
    match node.op_type, numbers:
        case "Range", [[start], [limit], [step]] if step:
            return (limit - start) // step
        case "ConstantOfShape", [[*sizes]]:
            return math.prod(sizes)
        case "Expand", [_, [*sizes]]:
            return math.prod(sizes) * read[0]
        case "Tile", [_, [*repeats]]:
            return math.prod(repeats) * read[0]
    return 1


def _integers(value: ir.Value | None) -> list[int] | None:
    """The entries of a short constant of integers."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in _INTEGERS or tensor.size > _LONGEST_SHAPE:
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]
