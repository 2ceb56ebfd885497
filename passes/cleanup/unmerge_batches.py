"""Multiply with separate batch and head axes, where a graph merges both into one axis and splits them again.

Before:  a3 = Reshape (a, {-1,s,8});  b3 = Reshape (b, {-1,8,t});  p = MatMul (a3, b3);  m = Mul (p, 0.5)
         r = Reshape (m, {2,3,s,t})                       a has shape (2,3,s,8), b has shape (2,3,8,t)
After:   q = MatMul (a, b);  r = Mul (q, 0.5)

`torch.bmm` and `torch.baddbmm` take three dimensions, so attention that uses them merges and splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, admitted
from planish.optimizer.ir.edit import remove_dead
from planish.optimizer.ir.graph import location_of, rank_of, scalar_of

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
_Dims = list[int | str]


@dataclass(frozen=True)
class UnmergeBatches(Pass):
    """Keep two leading axes separate through MatMuls, transpositions, sums and softmaxes of a merged tensor.

    1. Merged: a ``Reshape`` of (a, b, m, n) to (a·b, m, n), or of (a, b, n) to (a·b, 1, n).
    2. Followed: ``MatMul``, ``Transpose`` of the last two axes, ``Softmax`` over the last axis, and ``Add``, ``Sub``,
       ``Mul``, ``Div`` with a number or with another merged tensor.
    3. Ended by a ``Reshape`` back to (a, b, m, n). Without one, nothing is changed.
    """

    name: ClassVar[str] = "unmerge-batches"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph in one traversal."""
        followed = _Unmerged()
        sites: list[str] = []
        for node in list(model.graph):
            if node.domain != "" or not node.outputs or node.graph is None:
                continue
            apart = followed.split_again(node)
            if apart is not None and not node.outputs[0].is_graph_output() and admitted():
                sites.append(location_of(node))
                # Twins are inserted only here: most merged values never need one.
                model.graph.insert_before(node, followed.needed_by(apart))
                ir.convenience.replace_all_uses_with(node.outputs[0], apart)
                remove_dead(model.graph, node)
            else:
                followed.visit(node)
        return PassResult(model, bool(sites), sites=sites)


@dataclass
class _Unmerged:
    """An unmerged twin of each merged value; its nodes are inserted only when they are needed."""

    table: dict[int, ir.Value] = field(default_factory=dict)

    def split_again(self, node: ir.Node) -> ir.Value | None:
        """The unmerged twin that a Reshape would give, or None."""
        apart = self._of(node.inputs[0]) if node.op_type == "Reshape" else None
        wanted = _dims(node.outputs[0])
        dims = None if apart is None else _dims(apart)
        if dims is None or wanted is None or len(wanted) != 4:
            return None
        equal = [a == b for a, b in zip(dims, wanted, strict=True)]
        return apart if sum(equal) >= 3 else None  # of the same number of elements: three tell the fourth

    def needed_by(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that compute ``value`` and are not inserted yet, in order."""
        node = value.producer()
        if node is None or node.graph is not None:
            return []
        before = [needed for source in node.inputs if source is not None for needed in self.needed_by(source)]
        return list({id(needed): needed for needed in (*before, node)}.values())

    def visit(self, node: ir.Node) -> None:
        """Add the twin of one node, if it is followed."""
        twin = self._merged(node) if node.op_type == "Reshape" else self._carried(node)
        if twin is not None:
            self.table[id(node.outputs[0])] = twin

    def _of(self, value: ir.Value | None) -> ir.Value | None:
        return None if value is None else self.table.get(id(value))

    def _merged(self, node: ir.Node) -> ir.Value | None:
        """Case 1."""
        source = node.inputs[0]
        before, after = _dims(source), _dims(node.outputs[0])
        if source is None or before is None or after is None or len(after) != 3:
            return None
        if len(before) == 4 and after[1:] == before[2:]:
            return source
        if len(before) == 3 and after[1:] == [1, before[2]]:
            constant = ir.node("Constant", [], {"value": ir.tensor(np.array([2], np.int64))})
            return _twin_of(node, "Unsqueeze", [source, constant.outputs[0]], [*before[:2], 1, before[2]])
        return None

    def _carried(self, node: ir.Node) -> ir.Value | None:
        """Case 2."""
        if node.op_type == "Transpose":
            return self._transposed(node)
        if node.op_type == "Softmax":
            return self._normalized(node)
        if node.op_type == "MatMul":
            return self._multiplied(node)
        return self._combined(node) if node.op_type in _ELEMENTWISE else None

    def _transposed(self, node: ir.Node) -> ir.Value | None:
        source, perm = self._of(node.inputs[0]), node.attributes.get("perm")
        dims = None if source is None else _dims(source)
        if source is None or dims is None or perm is None or list(perm.as_ints()) != [0, 2, 1]:
            return None
        return _twin_of(node, "Transpose", [source], [dims[0], dims[1], dims[3], dims[2]], perm=[0, 1, 3, 2])

    def _normalized(self, node: ir.Node) -> ir.Value | None:
        source, axis = self._of(node.inputs[0]), node.attributes.get("axis")
        dims = None if source is None else _dims(source)
        if source is None or dims is None or (axis is not None and axis.as_int() not in (-1, 2)):
            return None
        return _twin_of(node, "Softmax", [source], dims, axis=-1)

    def _multiplied(self, node: ir.Node) -> ir.Value | None:
        left, right = (self._of(value) for value in node.inputs)
        one, other = (None if value is None else _dims(value) for value in (left, right))
        if left is None or right is None or one is None or other is None or one[:2] != other[:2]:
            return None
        return _twin_of(node, "MatMul", [left, right], [*one[:3], other[3]])

    def _combined(self, node: ir.Node) -> ir.Value | None:
        operands = [value if scalar_of(value) is not None else self._of(value) for value in node.inputs]
        shapes = [_dims(value) for value in operands if value is not None and scalar_of(value) is None]
        if None in operands or not shapes or any(dims is None or dims[:2] != (shapes[0] or [])[:2] for dims in shapes):
            return None
        if any((rank_of(value) or 0) > 1 for value in operands if scalar_of(value) is not None):
            return None
        dims = _broadcast([dims for dims in shapes if dims is not None])
        return None if dims is None else _twin_of(node, node.op_type, operands, dims)


def _dims(value: ir.Value | None) -> _Dims | None:
    """Dimensions that are all numbers or names."""
    if value is None or value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return None if None in dims else [dim for dim in dims if dim is not None]


def _broadcast(shapes: Sequence[_Dims]) -> _Dims | None:
    """The shape of an elementwise result; None if two dimensions differ and none is 1."""
    result: _Dims = []
    for dims in zip(*shapes, strict=True):
        others = {dim for dim in dims if dim != 1}
        if len(others) > 1:
            return None
        result.append(next(iter(others), 1))
    return result


def _twin_of(
    like: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], dims: _Dims, **attributes: object
) -> ir.Value:
    """The output of a new node in place of another, with the same PyTorch module."""
    name = f"{like.outputs[0].name}_unmerged"
    node = ir.node(op_type, inputs, attributes, name=name, metadata_props=dict(like.metadata_props))
    output = node.outputs[0]
    output.name, output.shape, output.type = name, ir.Shape(dims), like.outputs[0].type
    for source in inputs:
        producer = None if source is None else source.producer()
        if producer is not None and producer.graph is None and producer.op_type == "Constant":
            producer.name = f"{name}_axis"
            producer.outputs[0].name = producer.name
    return output
