"""Data propagation: integers of shape arithmetic, computed from a graph without running it.

Propagated through Shape, Gather, Slice, Concat, Squeeze, Unsqueeze, Cast, Identity, Reshape to rank 1 or 0, Add, Sub,
Mul and Div, and through the ConstantOfShape, Equal and Where with which exporters test whether a size is -1. An entry
is a number, the name of an axis, or unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from planish.optimizer.ir.graph import constant_of
from planish.optimizer.ir.program import SUM
from planish.optimizer.ir.shape_inference import follows_few, quiet_libraries
from planish.optimizer.ir.weightless import without_weights

Entry = int | str | None
"""One entry of an integer tensor: a number, the name of an axis, or unknown."""
_LONGEST = 64
"""Integer tensors with more entries are not propagated."""
_LEAST = -(1 << 63)
_LONGEST_NAME = 1 << 10
Followed = tuple[list[Entry], bool] | None
"""Entries of a tensor, and whether it is a scalar; None if the tensor is not propagated."""


def dims_of(shape: ir.Shape | None) -> list[Entry]:
    """Dimensions as entries; empty if the rank is unknown."""
    return [] if shape is None else [dim if isinstance(dim, int) else dim.value for dim in shape]


def correct_shapes(model: ir.Model) -> None:
    """Replace declared types and shapes that contradict shape inference, since passes rely on declared ones.

    Declarations that inference cannot check stay.
    """
    copy = without_weights(model)
    for graph in copy.graphs():
        for value in (*graph.outputs, *(output for node in graph for output in node.outputs)):
            value.shape = value.type = None
    proto = ir.to_proto(copy)
    with quiet_libraries(), suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=follows_few(copy)))
        # A clone has the same graphs, nodes and outputs in the same order, and inference removes none.
        for declared, true in zip(model.graphs(), inferred.graphs(), strict=True):
            for node, twin in zip(declared, true, strict=True):
                for value, other in zip(node.outputs, twin.outputs, strict=True):
                    _correct(value, other)


def _correct(value: ir.Value, inferred: ir.Value) -> None:
    if inferred.type is not None and inferred.dtype is not ir.DataType.UNDEFINED and value.type != inferred.type:
        value.type = inferred.type
    if value.shape is None or inferred.shape is None:
        return
    pairs = zip(value.shape, inferred.shape, strict=False)
    differs = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    if differs or len(value.shape) != len(inferred.shape):
        value.shape = inferred.shape


@dataclass
class PropagatedInts:
    """Entries of the propagated integer tensors, by value."""

    table: dict[int, tuple[list[Entry], bool]] = field(default_factory=dict)

    @classmethod
    def through(cls, graph: ir.Graph | ir.Function) -> PropagatedInts:
        """Propagate through every node of a graph, in order."""
        followed = cls()
        for node in graph:
            followed.visit(node)
        return followed

    def entries(self, value: ir.Value | None) -> list[Entry] | None:
        """Entries of a tensor of rank 0 or 1; None if it is not propagated."""
        followed = None if value is None else self.lookup(value)
        return None if followed is None else followed[0]

    def visit(self, node: ir.Node) -> None:
        """Propagate through one node, if its operator has a rule."""
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        followed = None if rule is None else rule(self, node)
        if followed is not None and len(followed[0]) <= _LONGEST and all(map(_is_legible, followed[0])):
            self.table[id(node.outputs[0])] = followed

    def lookup(self, value: ir.Value) -> Followed:
        """Entries of a propagated or constant tensor, and whether it is a scalar."""
        if id(value) in self.table:
            return self.table[id(value)]
        array = constant_of(value, limit=_LONGEST)
        if array is None or array.ndim > 1 or array.dtype not in (np.int64, np.int32):
            return None
        return [int(entry) for entry in array.reshape(-1)], array.ndim == 0


def _is_legible(entry: Entry) -> bool:
    """True unless a number overflows int64 or a sum of axes has too many terms. Both can double with each Add."""
    return _LEAST <= entry < -_LEAST if isinstance(entry, int) else entry is None or len(entry) <= _LONGEST_NAME


def _shape(ints: PropagatedInts, node: ir.Node) -> Followed:
    data = node.inputs[0]
    if data is None or data.shape is None:
        return None
    dims = dims_of(data.shape)
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    # Opset 15 added start and end; slice clamps both to the rank, as the standard does.
    return dims[slice(start.as_int() if start else None, end.as_int() if end else None)], False


def _gather(ints: PropagatedInts, node: ir.Node) -> Followed:
    entries, indices = ints.entries(node.inputs[0]), constant_of(node.inputs[1])
    if entries is None or indices is None or indices.ndim > 1:
        return None
    inside = all(-len(entries) <= int(i) < len(entries) for i in indices.reshape(-1))
    return ([entries[int(i)] for i in indices.reshape(-1)], indices.ndim == 0) if inside else None


def _slice(ints: PropagatedInts, node: ir.Node) -> Followed:
    entries = ints.entries(node.inputs[0])
    bounds = [constant_of(value) for value in node.inputs[1:]]
    if entries is None or len(bounds) < 2 or any(b is None or b.size != 1 for b in bounds):
        return None
    numbers = [int(b.reshape(())) for b in bounds if b is not None]
    step = numbers[3] if len(numbers) > 3 else 1
    return (entries[numbers[0] : numbers[1] : step], False) if step > 0 else None


def _concat(ints: PropagatedInts, node: ir.Node) -> Followed:
    parts = [ints.entries(value) for value in node.inputs]
    return None if any(part is None for part in parts) else ([e for part in parts for e in part or ()], False)


def _identity(ints: PropagatedInts, node: ir.Node) -> Followed:
    return None if node.inputs[0] is None else ints.lookup(node.inputs[0])


def _cast(ints: PropagatedInts, node: ir.Node) -> Followed:
    integer = ir.DataType(node.attributes["to"].as_int()) in (ir.DataType.INT64, ir.DataType.INT32)
    return _identity(ints, node) if integer else None


def _squeeze(ints: PropagatedInts, node: ir.Node) -> Followed:
    """Turn a vector of one entry into a scalar."""
    followed = _identity(ints, node)
    return (followed[0], True) if followed is not None and not followed[1] and len(followed[0]) == 1 else None


def _unsqueeze(ints: PropagatedInts, node: ir.Node) -> Followed:
    """Turn a scalar into a vector of one entry, if the node adds one axis."""
    followed = _identity(ints, node)
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes["axes"].as_ints())
    if followed is None or not followed[1] or axes is None or axes.size != 1:
        return None
    return followed[0], False


def _reshape_to_line(ints: PropagatedInts, node: ir.Node) -> Followed:
    shape = constant_of(node.inputs[1])
    entries = ints.entries(node.inputs[0])
    if shape is None or entries is None or shape.size > 1:
        return None
    return (entries, False) if shape.size == 1 else (entries, True) if len(entries) == 1 else None


def _on_numbers(operation: Callable[[int, int], int | None]) -> Callable[[Entry, Entry], Entry]:
    return lambda a, b: operation(a, b) if isinstance(a, int) and isinstance(b, int) else None


def _add(left: Entry, right: Entry) -> Entry:
    """The sum of two numbers; of two axes, the name of the axis as long as both together."""
    if isinstance(left, str) and isinstance(right, str):
        return SUM.join(sorted([*left.split(SUM), *right.split(SUM)]))
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return left if right == 0 else right if left == 0 else None


def _arithmetic(operation: Callable[[Entry, Entry], Entry]) -> Callable[[PropagatedInts, ir.Node], Followed]:
    def rule(ints: PropagatedInts, node: ir.Node) -> Followed:
        left, right = (None if value is None else ints.lookup(value) for value in node.inputs)
        if left is None or right is None or len(left[0]) != len(right[0]):
            return None
        return [operation(a, b) for a, b in zip(left[0], right[0], strict=True)], left[1] and right[1]

    return rule


def _divide(left: int, right: int) -> int | None:
    """Integer division toward zero, as in the standard; None for a division by zero."""
    return None if right == 0 else abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _constant_of_shape(ints: PropagatedInts, node: ir.Node) -> Followed:
    """A vector of equal integers."""
    length, value = ints.entries(node.inputs[0]), node.attributes.get("value")
    filled = None if value is None else value.as_tensor().numpy()
    if length is None or len(length) != 1 or not isinstance(length[0], int) or filled is None:
        return None
    whole = filled.dtype in (np.int64, np.int32) and length[0] <= _LONGEST
    return ([int(filled.reshape(()))] * length[0], False) if whole else None


def _equal(ints: PropagatedInts, node: ir.Node) -> Followed:
    """Entries 1 for equal and 0 for different. An axis never equals a negative number."""
    left, right = (None if value is None else ints.lookup(value) for value in node.inputs)
    if left is None or right is None or len(left[0]) != len(right[0]):
        return None
    return [_same(a, b) for a, b in zip(left[0], right[0], strict=True)], left[1] and right[1]


def _same(left: Entry, right: Entry) -> Entry:
    if isinstance(left, int) and isinstance(right, int):
        return int(left == right)
    # Sizes of axes are not negative, so a negative number differs from each; other comparisons stay unknown.
    number, size = (left, right) if isinstance(left, int) else (right, left)
    return 0 if isinstance(number, int) and number < 0 and isinstance(size, str) else None


def _where(ints: PropagatedInts, node: ir.Node) -> Followed:
    operands = [None if value is None else ints.lookup(value) for value in node.inputs]
    lines = [entries for entries, _ in filter(None, operands)]
    if len(lines) != 3 or len({len(line) for line in lines}) != 1:
        return None
    chosen: list[Entry] = [
        (yes if test else no) if isinstance(test, int) else None for test, yes, no in zip(*lines, strict=True)
    ]
    return chosen, all(scalar for _, scalar in filter(None, operands))


_RULES: Mapping[str, Callable[[PropagatedInts, ir.Node], Followed]] = {
    "Shape": _shape,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": _identity,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Cast": _cast,
    "Reshape": _reshape_to_line,
    "Add": _arithmetic(_add),
    "Sub": _arithmetic(_on_numbers(lambda a, b: a - b)),
    "Mul": _arithmetic(_on_numbers(lambda a, b: a * b)),
    "Div": _arithmetic(_on_numbers(_divide)),
    "ConstantOfShape": _constant_of_shape,
    "Equal": _equal,
    "Where": _where,
}
