"""Replace computed shapes by constants.

Before:  s = Shape (x);  b = Gather (s, 0);  …;  t = Concat (b, n, 12, 32);  r = Reshape (x, t)
After:   r = Reshape (x, {0, 0, 12, 32})          (0 keeps a dimension; at most one is -1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.data_propagation import Entry, PropagatedInts, dims_of
from planish.optimizer.ir.edit import add_initializer, allow_plain_initializers
from planish.optimizer.ir.graph import constant_of, location_of, rank_of, sole_user
from planish.passes.cleanup._library import infer_again


@dataclass(frozen=True)
class SimplifyShapes(Pass):
    """Propagate integers through shape arithmetic, and replace known ones by constants.

    1. The shape of a ``Reshape`` becomes constant if every entry is a number, the input's dimension at the same index
       (written 0), or the only other entry (written -1).
    2. A ``Reshape`` or ``Expand`` to its input's shape is removed.
    3. A ``Softmax`` over the last axis, between a ``Flatten`` that keeps that axis and the inverse ``Reshape``, reads
       the original tensor (the form of opset 12's softmax in later opsets).
    4. Any other small integer tensor of numbers becomes a constant.

    Constants reveal further shapes, so the pass repeats until nothing changes.
    """

    name: ClassVar[str] = "simplify-shapes"

    def call(self, model: ir.Model) -> PassResult:
        """Simplify the main graph; subgraphs are unchanged."""
        sites: list[str] = []
        while True:
            changed, refusals = self._once(model)
            sites += changed
            if not changed:
                break
            allow_plain_initializers(model)
            infer_again(model)
        return PassResult(model, bool(sites), sites=sites, refusals=refusals)

    def _once(self, model: ir.Model) -> tuple[list[str], list[Refusal]]:
        """Sites and refusals of one traversal of the graph."""
        ints = PropagatedInts()
        sites: list[str] = []
        refusals: list[Refusal] = []
        for node in list(model.graph):
            ints.visit(node)
            if node.op_type == "Softmax" and node.domain == "" and _unflatten(model.graph, node):  # Case 3
                sites.append(location_of(node))
            elif node.op_type == "Reshape" and node.domain == "" and node.graph is not None:
                self._reshape(model.graph, node, ints, sites, refusals)
            elif _spreads_nothing(node, ints) and admitted():  # Case 2
                sites.append(location_of(node))
                _bypass(model.graph, node)
            elif (numbers := _numbers(ints, node)) is not None and admitted():
                _replace(model.graph, node, numbers)
                sites.append(location_of(node))
        return sites, refusals

    def _reshape(
        self, graph: ir.Graph, node: ir.Node, ints: PropagatedInts, sites: list[str], refusals: list[Refusal]
    ) -> None:
        data, shape = node.inputs[:2]
        entries = ints.entries(shape)
        # With allowzero, 0 is a size instead of a copy.
        if data is None or entries is None or (0 in entries and _allows_zero(node)):
            return
        dims = dims_of(data.shape)
        if _is_same(dims, entries) and not node.outputs[0].is_graph_output() and admitted():  # Case 2
            sites.append(location_of(node))
            _bypass(graph, node)
            return
        wanted = reshape_target(dims, entries)
        if constant_of(shape) is not None:
            return
        if wanted is None:
            refusals.append(Refusal.at(node, "more than one dimension of its shape is not known", shape))
            return
        if not admitted():
            return
        value = add_initializer(graph, f"{node.outputs[0].name}_shape", np.array(wanted, np.int64))
        node.replace_input_with(1, value)
        # The new shape uses 0 for copied dimensions.
        node.attributes.pop("allowzero", None)
        sites.append(location_of(node))


def _unflatten(graph: ir.Graph, softmax: ir.Node) -> bool:
    """Case 3: read the tensor before the Flatten; True if the softmax was rewritten."""
    flatten = None if softmax.inputs[0] is None else softmax.inputs[0].producer()
    reshape = sole_user(softmax.outputs[0])
    if flatten is None or reshape is None or flatten.op_type != "Flatten" or reshape.op_type != "Reshape":
        return False
    if reshape.outputs[0].is_graph_output():
        return False
    source, shape = flatten.inputs[0], None if reshape.inputs[1] is None else reshape.inputs[1].producer()
    axis, over = flatten.attributes.get("axis"), softmax.attributes.get("axis")
    keeps_last = axis is not None and axis.as_int() == (rank_of(source) or 0) - 1
    undoes = shape is not None and shape.op_type == "Shape" and shape.inputs[0] is source and not shape.attributes
    if source is None or not keeps_last or not undoes or (over is not None and over.as_int() not in (-1, 1)):
        return False
    if not admitted():
        return False
    softmax.replace_input_with(0, source)
    softmax.attributes.add(ir.AttrInt64("axis", -1))
    # Before opset 13, Softmax flattened its input; the converter makes that explicit.
    softmax.outputs[0].shape = source.shape
    ir.convenience.replace_all_uses_with(reshape.outputs[0], softmax.outputs[0])
    graph.remove(reshape, safe=True)
    return True


def _spreads_nothing(node: ir.Node, ints: PropagatedInts) -> bool:
    """True for an Expand to the input's own shape, or to ones in front of it."""
    if node.op_type != "Expand" or node.domain != "" or node.outputs[0].is_graph_output():
        return False
    entries, dims = ints.entries(node.inputs[1]), dims_of(None if node.inputs[0] is None else node.inputs[0].shape)
    if not dims or entries is None or len(entries) > len(dims):
        return False
    return all(
        entry == 1 or (entry is not None and entry == dim)
        for entry, dim in zip(entries[::-1], dims[::-1], strict=False)
    )


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Redirect the readers of a node's output to its input."""
    if node.inputs[0] is not None:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        graph.remove(node, safe=True)


def _is_same(dims: Sequence[Entry], entries: Sequence[Entry]) -> bool:
    """True if a reshape to ``entries`` gives the input's shape; one entry may be inferred (-1)."""
    if len(dims) != len(entries) or list(entries).count(-1) > 1 or None in dims:
        return False
    return all(entry in (dim, -1, 0) for dim, entry in zip(dims, entries, strict=True))


def reshape_target(dims: Sequence[Entry], entries: Sequence[Entry]) -> list[int] | None:
    """Constant target of a Reshape of data of shape ``dims`` to ``entries``; None if two entries are unknown."""
    wanted: list[int] = []
    for index, entry in enumerate(entries):
        kept = isinstance(entry, str) and index < len(dims) and dims[index] == entry
        wanted.append(entry if isinstance(entry, int) else 0 if kept else -1)
    # Reshape can infer at most one dimension.
    return wanted if wanted.count(-1) <= 1 else None


def _allows_zero(node: ir.Node) -> bool:
    attribute = node.attributes.get("allowzero")
    return attribute is not None and attribute.as_int() != 0


def _numbers(ints: PropagatedInts, node: ir.Node) -> np.ndarray | None:
    """The array of a replaceable node with known integer entries."""
    output = node.outputs[0]
    followed = ints.lookup(output)
    dtype = output.dtype or ir.DataType.INT64
    if followed is None or len(node.outputs) != 1 or node.op_type == "Constant" or output.is_graph_output():
        return None
    entries = [entry for entry in followed[0] if isinstance(entry, int)]
    if len(entries) != len(followed[0]) or dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    array = np.array(entries, dtype.numpy())
    return array.reshape(()) if followed[1] else array


def _replace(graph: ir.Graph, node: ir.Node, numbers: np.ndarray) -> None:
    output = node.outputs[0]
    constant = add_initializer(graph, f"{output.name}_value", numbers)
    ir.convenience.replace_all_uses_with(output, constant)
    graph.remove(node, safe=True)
