"""Merge chains of reshapes or transpositions into one operator.

Before:  a = Unsqueeze (x, {0});  b = Unsqueeze (a, {1});  f = Reshape (z, {-1,768});  g = Reshape (f, {2,5,12,64})
         t = Transpose <perm=[1,0,2]> (y);  u = Transpose <perm=[1,0,2]> (t)
After:   b = Unsqueeze (x, {0,1});  what reads u reads y;  g = Reshape (z, {2,5,12,64})
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, admitted
from planish.optimizer.ir.edit import remove_dead
from planish.optimizer.ir.graph import constant_of, location_of, opset_of, rank_of

_AXES_ARE_INPUTS = 13


@dataclass(frozen=True)
class MergeMoves(Pass):
    """Merge a node with its producer if one node of that kind can do both moves.

    1. ``Unsqueeze`` of ``Unsqueeze``, from opset 13.
    2. ``Transpose`` of ``Transpose``; if the two cancel, readers of the second read the input of the first.
    3. ``Reshape`` to a constant shape without zeros, of ``Reshape``.

    The producer stays if it has other readers.
    """

    name: ClassVar[str] = "merge-moves"

    def call(self, model: ir.Model) -> PassResult:
        """Visit the main graph and its subgraphs once, in order, so that a chain is merged from its beginning."""
        sites: list[str] = []
        for graph in model.graphs():
            for node in list(graph):
                before = _same_before(node)
                if before is not None and self._merge(graph, node, before, opset_of(model)):
                    sites.append(location_of(node))
        return PassResult(model, bool(sites), sites=sites)

    def _merge(self, graph: ir.Graph, node: ir.Node, before: ir.Node, opset: int) -> bool:
        """Redirect ``node`` to the input of ``before``; True if it was possible."""
        if node.op_type == "Transpose":
            merged = _composed(node, before)
        elif node.op_type == "Unsqueeze":
            merged = _both_axes(node, before) if opset >= _AXES_ARE_INPUTS else None
        else:
            merged = _whole_shape(node)
        if merged is None or not admitted():
            return False
        source, output = before.inputs[0], node.outputs[0]
        node.replace_input_with(0, source)
        if (
            node.op_type == "Transpose"
            and source is not None
            and merged == sorted(merged)
            and not output.is_graph_output()
        ):
            ir.convenience.replace_all_uses_with(output, source)
            graph.remove(node, safe=True)
        elif node.op_type == "Transpose":
            node.attributes.add(ir.AttrInt64s("perm", merged))
        elif node.op_type == "Unsqueeze":
            axes = ir.node("Constant", [], {"value": ir.tensor(np.array(merged, np.int64))})
            axes.name = axes.outputs[0].name = f"{node.outputs[0].name}_axes"
            graph.insert_before(node, axes)
            node.replace_input_with(1, axes.outputs[0])
        remove_dead(graph, before)
        return True


def _same_before(node: ir.Node) -> ir.Node | None:
    """The producer in the same graph, if it is of the same kind."""
    if node.domain != "" or node.op_type not in ("Unsqueeze", "Transpose", "Reshape") or node.inputs[0] is None:
        return None
    before = node.inputs[0].producer()
    same = before is not None and (before.op_type, before.domain, before.graph) == (node.op_type, "", node.graph)
    return before if same else None


def _composed(node: ir.Node, before: ir.Node) -> list[int] | None:
    """The combined permutation; without `perm` a Transpose reverses all axes."""
    perms = []
    for each in (before, node):
        written, rank = each.attributes.get("perm"), rank_of(each.inputs[0])
        # The default permutation reverses all axes: its length must be known.
        if written is None and rank is None:
            return None
        perms.append(list(written.as_ints()) if written is not None else list(range(rank or 0))[::-1])
    return [perms[0][axis] for axis in perms[1]]


def _both_axes(node: ir.Node, before: ir.Node) -> list[int] | None:
    """The axes that two Unsqueezes add together."""
    written = [constant_of(each.inputs[1]) for each in (before, node)]
    ranks = [rank_of(each.outputs[0]) for each in (before, node)]
    if written[0] is None or written[1] is None or ranks[0] is None or ranks[1] is None:
        return None
    last = {int(axis) % ranks[1] for axis in written[1].reshape(-1)}
    kept = [axis for axis in range(ranks[1]) if axis not in last]
    return sorted(last | {kept[int(axis) % ranks[0]] for axis in written[0].reshape(-1)})


def _whole_shape(node: ir.Node) -> list[int] | None:
    """The target of a Reshape, if it is constant and copies no dimension."""
    target = constant_of(node.inputs[1])
    # A zero copies a dimension of the input, which is another tensor after the merge.
    return None if target is None or not target.all() else [int(size) for size in target]
