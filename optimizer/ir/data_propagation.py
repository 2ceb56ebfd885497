"""Integers followed through shape arithmetic: what a graph computes of its own shapes, without running it.

Followed are Shape, Gather, Slice, Concat, Squeeze, Unsqueeze, Cast, Identity, Reshape to a line or a scalar, Add, Sub,
Mul and Div, and the ConstantOfShape, Equal and Where by which exporters ask whether a size is -1. An entry is a number,
the name of an axis, or unknown.
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
"""Integer tensors of more entries are not followed."""
_LEAST = -(1 << 63)
_LONGEST_NAME = 1 << 10
Found = tuple[list[Entry], bool] | None
"""Entries of a tensor and whether it is a scalar; None if it is not followed."""


def dims_of(shape: ir.Shape | None) -> list[Entry]:
    """Dimensions as entries; nothing if the rank is not known."""
    return [] if shape is None else [dim if isinstance(dim, int) else dim.value for dim in shape]


def correct_shapes(model: ir.Model) -> None:
    """Replace types and shapes that a file declares and that inference contradicts: passes believe what is written.

    What inference knows nothing of stays as it is declared.
    """
    copy = without_weights(model)
    for graph in copy.graphs():
        for value in (*graph.outputs, *(made for node in graph for made in node.outputs)):
            value.shape = value.type = None
    proto = ir.to_proto(copy)
    with quiet_libraries(), suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=follows_few(copy)))
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
    """Entries of the integer tensors seen so far, by value."""

    table: dict[int, tuple[list[Entry], bool]] = field(default_factory=dict)

    @classmethod
    def through(cls, graph: ir.Graph | ir.Function) -> PropagatedInts:
        """Follow every node of a graph, in order."""
        followed = cls()
        for node in graph:
            followed.visit(node)
        return followed

    def entries(self, value: ir.Value | None) -> list[Entry] | None:
        """Entries of a tensor of rank zero or one, or None if it is not followed."""
        found = None if value is None else self.lookup(value)
        return None if found is None else found[0]

    def visit(self, node: ir.Node) -> None:
        """Follow one node, if it is one of those that keep integers legible."""
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        found = None if rule is None else rule(self, node)
        if found is not None and len(found[0]) <= _LONGEST and all(map(_is_legible, found[0])):
            self.table[id(node.outputs[0])] = found

    def lookup(self, value: ir.Value) -> Found:
        """Entries of a followed or constant tensor, and whether it is a scalar."""
        if id(value) in self.table:
            return self.table[id(value)]
        array = constant_of(value, limit=_LONGEST)
        if array is None or array.ndim > 1 or array.dtype not in (np.int64, np.int32):
            return None
        return [int(entry) for entry in array.reshape(-1)], array.ndim == 0


def _is_legible(entry: Entry) -> bool:
    """Not a number that wraps around in the graph, nor the sum of ever more axes: both double with each Add."""
    return _LEAST <= entry < -_LEAST if isinstance(entry, int) else entry is None or len(entry) <= _LONGEST_NAME


def _shape(known: PropagatedInts, node: ir.Node) -> Found:
    data = node.inputs[0]
    if data is None or data.shape is None:
        return None
    dims = dims_of(data.shape)
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return dims[slice(start.as_int() if start else None, end.as_int() if end else None)], False


def _gather(known: PropagatedInts, node: ir.Node) -> Found:
    entries, indices = known.entries(node.inputs[0]), constant_of(node.inputs[1])
    if entries is None or indices is None or indices.ndim > 1:
        return None
    inside = all(-len(entries) <= int(i) < len(entries) for i in indices.reshape(-1))
    return ([entries[int(i)] for i in indices.reshape(-1)], indices.ndim == 0) if inside else None


def _slice(known: PropagatedInts, node: ir.Node) -> Found:
    entries = known.entries(node.inputs[0])
    bounds = [constant_of(value) for value in node.inputs[1:]]
    if entries is None or len(bounds) < 2 or any(b is None or b.size != 1 for b in bounds):
        return None
    numbers = [int(b.reshape(())) for b in bounds if b is not None]
    step = numbers[3] if len(numbers) > 3 else 1
    return (entries[numbers[0] : numbers[1] : step], False) if step > 0 else None


def _concat(known: PropagatedInts, node: ir.Node) -> Found:
    parts = [known.entries(value) for value in node.inputs]
    return None if any(part is None for part in parts) else ([e for part in parts for e in part or ()], False)


def _identity(known: PropagatedInts, node: ir.Node) -> Found:
    return None if node.inputs[0] is None else known.lookup(node.inputs[0])


def _cast(known: PropagatedInts, node: ir.Node) -> Found:
    integer = ir.DataType(node.attributes["to"].as_int()) in (ir.DataType.INT64, ir.DataType.INT32)
    return _identity(known, node) if integer else None


def _squeeze(known: PropagatedInts, node: ir.Node) -> Found:
    """A line of one entry becomes a scalar."""
    found = _identity(known, node)
    return (found[0], True) if found is not None and not found[1] and len(found[0]) == 1 else None


def _unsqueeze(known: PropagatedInts, node: ir.Node) -> Found:
    """A scalar becomes a line of one entry, if it gets one axis."""
    found = _identity(known, node)
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes["axes"].as_ints())
    return (found[0], False) if found is not None and found[1] and axes is not None and axes.size == 1 else None


def _reshape_to_line(known: PropagatedInts, node: ir.Node) -> Found:
    shape = constant_of(node.inputs[1])
    entries = known.entries(node.inputs[0])
    if shape is None or entries is None or shape.size > 1:
        return None
    return (entries, False) if shape.size == 1 else (entries, True) if len(entries) == 1 else None


def _on_numbers(operation: Callable[[int, int], int | None]) -> Callable[[Entry, Entry], Entry]:
    return lambda a, b: operation(a, b) if isinstance(a, int) and isinstance(b, int) else None


def _add(left: Entry, right: Entry) -> Entry:
    """The sum of numbers; of two axes, the name of the axis that is as long as both together."""
    if isinstance(left, str) and isinstance(right, str):
        return SUM.join(sorted([*left.split(SUM), *right.split(SUM)]))
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return left if right == 0 else right if left == 0 else None


def _arithmetic(operation: Callable[[Entry, Entry], Entry]) -> Callable[[PropagatedInts, ir.Node], Found]:
    def rule(known: PropagatedInts, node: ir.Node) -> Found:
        left, right = (None if value is None else known.lookup(value) for value in node.inputs)
        if left is None or right is None or len(left[0]) != len(right[0]):
            return None
        return [operation(a, b) for a, b in zip(left[0], right[0], strict=True)], left[1] and right[1]

    return rule


def _divide(left: int, right: int) -> int | None:
    """Towards zero, as the standard does; nothing is known of a division by zero."""
    return None if right == 0 else abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _constant_of_shape(known: PropagatedInts, node: ir.Node) -> Found:
    """A line of equal integers."""
    length, value = known.entries(node.inputs[0]), node.attributes.get("value")
    filled = None if value is None else value.as_tensor().numpy()
    if length is None or len(length) != 1 or not isinstance(length[0], int) or filled is None:
        return None
    whole = filled.dtype in (np.int64, np.int32) and length[0] <= _LONGEST
    return ([int(filled.reshape(()))] * length[0], False) if whole else None


def _equal(known: PropagatedInts, node: ir.Node) -> Found:
    """Entries 1 and 0 for yes and no; a size is never negative."""
    left, right = (None if value is None else known.lookup(value) for value in node.inputs)
    if left is None or right is None or len(left[0]) != len(right[0]):
        return None
    return [_same(a, b) for a, b in zip(left[0], right[0], strict=True)], left[1] and right[1]


def _same(left: Entry, right: Entry) -> Entry:
    if isinstance(left, int) and isinstance(right, int):
        return int(left == right)
    number, size = (left, right) if isinstance(left, int) else (right, left)
    return 0 if isinstance(number, int) and number < 0 and isinstance(size, str) else None


def _where(known: PropagatedInts, node: ir.Node) -> Found:
    found = [None if value is None else known.lookup(value) for value in node.inputs]
    lines = [entries for entries, _ in filter(None, found)]
    if len(lines) != 3 or len({len(line) for line in lines}) != 1:
        return None
    chosen: list[Entry] = [
        (yes if test else no) if isinstance(test, int) else None for test, yes, no in zip(*lines, strict=True)
    ]
    return chosen, all(scalar for _, scalar in filter(None, found))


_RULES: Mapping[str, Callable[[PropagatedInts, ir.Node], Found]] = {
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
