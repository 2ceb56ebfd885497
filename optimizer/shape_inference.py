"""The standard's type and shape inference on graphs that nobody vouches for: silent, and in bounded memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common

_LIBRARIES = ("onnx_ir", "onnxscript")
_MOST_ENTRIES = 1 << 16
"""Integers of one value that are followed: shapes are shorter by far."""
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

    It holds each of them as a message: 34 Concats that double a shape would take all memory. Every other operator that
    it follows gives no more integers than it gets.
    """
    counts: dict[int, int] = {}

    def count_of(value: ir.Value | None) -> int:
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.dtype not in _INTEGERS or len(tensor.shape) > 1:
            return counts.get(id(value), 1)
        return tensor.size

    for graph in (*model.graphs(), *model.functions.values()):
        for node in graph:
            read = list(map(count_of, node.inputs))
            count = sum(read) if node.op_type == "Concat" else max(read, default=1)
            if count > _MOST_ENTRIES:
                return False
            counts.update((id(value), count) for value in node.outputs)
    return True
