"""Type and shape inference of the standard for untrusted graphs: without messages, and in bounded memory."""

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
"""Maximum number of integers per value that are propagated; shapes are far shorter."""
_LONGEST_SHAPE = 64
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings and tracebacks of onnx_ir and onnxscript on standard error.

    On such a failure these libraries leave the graph unchanged.
    """
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    for name in _LIBRARIES:
        # They log a traceback for each operator that they cannot evaluate, also in valid models.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def infer_shapes(model: ir.Model) -> None:
    """Infer shapes and store them; a graph that inference rejects stays unchanged."""
    with quiet_libraries():
        common.ShapeInferencePass(data_prop=follows_few(model))(model)


def follows_few(model: ir.Model) -> bool:
    """True if inference may propagate integer values as well (data propagation) in bounded memory.

    Inference stores each value as a message (140 bytes in onnx 1.23), even for a vector of which only the length is
    known: 34 Concats that double a shape, or one Range of constants, would exhaust memory.
    """
    counts: dict[int, int] = {}
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        counts.update((id(value), _vector_length(value)) for value in graph.inputs)
        for node in graph:
            read = [counts.get(id(value), _count_of(value)) for value in node.inputs]
            # Only Concat and the generators below make more entries than they read.
            count = max(sum(read) if node.op_type == "Concat" else max(read, default=1), _generated(node, read))
            if count > _MOST_ENTRIES:
                return False
            counts.update((id(value), count) for value in node.outputs)
    return all(count <= _MOST_ENTRIES for count in counts.values())


def _vector_length(value: ir.Value) -> int:
    sizes = [] if value.shape is None or value.dtype not in _INTEGERS else list(value.shape)
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else 1


def _count_of(value: ir.Value | None) -> int:
    """Number of integers in a constant vector; 1 for other values, whose size the file bounds."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return 1 if tensor is None or tensor.dtype not in _INTEGERS or len(tensor.shape) > 1 else tensor.size


def _generated(node: ir.Node, read: Sequence[int]) -> int:
    """Number of entries that an operator generates, determined by its constant inputs."""
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
    """The entries of a short integer constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in _INTEGERS or tensor.size > _LONGEST_SHAPE:
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]
