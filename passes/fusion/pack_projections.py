"""Multiply once by the matrices of several projections of the same input.

Before:  a = MatMul (x, wq);  q = Add (a, bq);  b = MatMul (x, wk);  k = Add (b, bk);  c = MatMul (x, wv)
         v = Add (c, bv)
After:   p = MatMul (x, w);  s = Add (p, b);  q, k, v = Split <axis=-1> (s, {768, 768, 768})       w = [wq | wk | wv]

A product without a bias of its own gets zeros if others have one. Where none has, nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import add_initializer, copy_location, forget_unread
from planish.optimizer.ir.graph import IN_FLOAT, is_weight_matrix, location_of, sizes_of, sole_user
from planish.optimizer.ir.lazy_tensors import lazy


@dataclass(frozen=True)
class Projection:
    """A MatMul with a constant matrix, and the addition of its bias where it has one."""

    product: ir.Node
    weight: ir.Value
    addition: ir.Node | None = None
    bias: ir.Value | None = None

    @property
    def result(self) -> ir.Value:
        """The value that others read."""
        return (self.addition or self.product).outputs[0]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return _sizes(self.weight)[1]


@dataclass(frozen=True)
class PackProjections(Pass):
    """Concatenate the matrices of MatMuls that read one activation, and their biases.

    Packing pays if each MatMul has overhead beside its arithmetic: integer MatMuls share one rescaling of their rows.
    """

    name: ClassVar[str] = "pack-projections"

    def call(self, model: ir.Model) -> PassResult:
        """Pack every group of two or more projections of the main graph."""
        result = PassResult(model, modified=False)
        by_input: dict[int, list[ir.Node]] = {}
        for node in model.graph:
            if (
                node.op_type == "MatMul"
                and node.domain == ""
                and is_weight_matrix(node.inputs[1])
                and IN_FLOAT not in node.metadata_props
            ):
                by_input.setdefault(id(node.inputs[0]), []).append(node)
        for nodes in (nodes for nodes in by_input.values() if len(nodes) > 1):
            group = [_projection(node) for node in nodes]
            reason = _obstacle(group)
            if reason is not None:
                result.refusals.append(Refusal.at(nodes[0], *reason))
            elif admitted():
                result.sites.append(location_of(nodes[0]))
                _pack(model.graph, group)
        result.modified = bool(result.sites)
        return result


def _projection(product: ir.Node) -> Projection:
    weight, addition = product.inputs[1], sole_user(product.outputs[0])
    if weight is None:
        raise ValueError(f"{product.name!r} has no matrix")
    # A bias that is added in a branch of an If does not always apply.
    if addition is None or addition.op_type != "Add" or addition.domain != "" or addition.graph is not product.graph:
        return Projection(product, weight)
    bias = addition.inputs[1] if addition.inputs[0] is product.outputs[0] else addition.inputs[0]
    if bias is None or bias.is_graph_input() or bias.const_value is None or _sizes(bias) != _sizes(weight)[1:]:
        return Projection(product, weight)
    return Projection(product, weight, addition, bias)


def _obstacle(group: Sequence[Projection]) -> tuple[str, ir.Value] | None:
    """The reason why a group cannot be packed: a shared matrix, an output of the graph, another type."""
    for projection in group:
        # Packing copies the matrix: a shared one would be stored twice.
        if len(list(projection.weight.uses())) > 1:
            return "one of the matrices is used elsewhere as well", projection.weight
        if projection.result.is_graph_output():
            return "one of the projections is an output of the graph", projection.result
        if projection.weight.dtype != group[0].weight.dtype:
            return "the matrices are of different types", projection.weight
    return None


def _pack(graph: ir.Graph, group: Sequence[Projection]) -> None:
    first = group[0].product
    name = f"{group[0].weight.name}_packed"
    weight = _joined(graph, name, [_constant(projection.weight) for projection in group], axis=1)
    widths = np.array([projection.width for projection in group], np.int64)
    base = first.outputs[0].name
    nodes = [ir.node("MatMul", [first.inputs[0], weight], name=f"{base}_packed")]
    biases = [projection.bias for projection in group if projection.bias is not None]
    if biases:
        bias = _joined(graph, f"{biases[0].name}_packed", [_bias_of(projection) for projection in group], axis=0)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{base}_packed_bias"))
    _describe(group, nodes, int(widths.sum()))
    split = ir.node(
        "Split",
        [nodes[-1].outputs[0], add_initializer(graph, f"{name}_widths", widths)],
        {"axis": -1},
        num_outputs=len(group),
        name=f"{base}_split",
    )
    graph.insert_before(first, [*nodes, split])
    for projection, output in zip(group, split.outputs, strict=True):
        old = projection.result
        output.shape, output.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, output)
        removed = [node for node in (projection.addition, projection.product) if node is not None]
        graph.remove(removed, safe=True)
        # Values keep their names: other tools, and later runs, find them by name.
        output.name, old.name = old.name, None
    forget_unread(graph, [*(projection.weight for projection in group), *biases])


def _constant(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"{value.name!r} is not a constant")
    return value.const_value


def _bias_of(projection: Projection) -> ir.TensorProtocol:
    """The bias of a projection: zeros where it has none."""
    if projection.bias is not None:
        return _constant(projection.bias)
    dtype = _constant(projection.weight).dtype
    return ir.tensor(np.zeros(projection.width, dtype.numpy()), dtype)


def _joined(graph: ir.Graph, name: str, tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.Value:
    """An initializer of concatenated constants, concatenated when it is read."""
    shape = sizes_of(tensors[0])
    shape[axis] = sum(sizes_of(tensor)[axis] for tensor in tensors)
    # Concatenated only when the file is written: large models never hold both copies.
    joined = lazy(lambda: np.concatenate([t.numpy() for t in tensors], axis), tensors[0].dtype, shape, name)
    return add_initializer(graph, name, joined)


def _describe(group: Sequence[Projection], nodes: Sequence[ir.Node], width: int) -> None:
    """Set names, type, shape and source location of new nodes."""
    old = group[0].product.outputs[0]
    for node in nodes:
        node.outputs[0].name = node.name
        node.outputs[0].type = old.type
        if old.shape is not None:
            node.outputs[0].shape = ir.Shape([*old.shape[:-1], width])
        copy_location(group[0].product, node)


def _sizes(value: ir.Value) -> list[int]:
    return [] if value.const_value is None else sizes_of(value.const_value)
