"""Bypass operators whose output equals their input.

Before:  y = Identity (x);  z = Cast <to=1> (y);  t = Transpose <perm=[0,1]> (z);  r = Relu (t)
After:   r = Relu (x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, admitted
from planish.optimizer.ir.graph import constant_of, graphs_of, location_of, rank_of

_BEYOND = 2**31 - 1
"""Lower bound of the end with which exporters mark "to the end of the axis"."""
_NEUTRAL = {"Add": 0, "Mul": 1, "And": True, "Or": False}
"""Neutral second operands of operators. Zero is not neutral for floats: -0 + 0 is +0."""


@dataclass(frozen=True)
class EliminateIdentities(Pass):
    """Remove operators without effect.

    1. ``Identity``.
    2. ``Cast`` to the type that its input has.
    3. ``Dropout`` outside of training whose mask is unused.
    4. ``Transpose`` by the identity permutation.
    5. ``Slice`` of the whole tensor.
    6. ``Add`` of zero to integers, ``Mul`` by one, ``And`` with true, ``Or`` with false.

    A node between a graph input and a graph output stays, since a graph cannot rename an input.
    """

    name: ClassVar[str] = "eliminate-identities"

    def call(self, model: ir.Model) -> PassResult:
        """Bypass every such node in the graph, its subgraphs and functions."""
        sites: list[str] = []
        for graph in graphs_of(model):
            for node in list(graph):
                source = _given_back(node)
                if source is not None and _removable(node, source) and admitted():
                    sites.append(location_of(node))
                    _bypass(node, source)
        return PassResult(model, bool(sites), sites=sites)


def _given_back(node: ir.Node) -> ir.Value | None:
    """The input that equals the output of a node, or None."""
    if node.domain != "" or not node.inputs:
        return None
    if node.op_type in _NEUTRAL:  # Case 6
        return _other_than_neutral(node)
    return node.inputs[0] if _does_nothing(node) else None


def _other_than_neutral(node: ir.Node) -> ir.Value | None:
    """The operand that is combined with a neutral number, if that does not broadcast it."""
    if len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        number, rank = constant_of(other), rank_of(value)
        # A constant of higher rank would add axes.
        if number is None or rank is None or value is None or number.size != 1 or number.ndim > rank:
            continue
        exact = node.op_type != "Add" or (value.dtype is not None and value.dtype.is_integer())
        if exact and number.reshape(()) == _NEUTRAL[node.op_type]:
            return value
    return None


def _does_nothing(node: ir.Node) -> bool:
    if node.inputs[0] is None:
        return False
    match node.op_type:
        case "Identity":  # Case 1
            return True
        case "Cast":  # Case 2
            return node.inputs[0].dtype is not None and node.inputs[0].dtype == node.attributes["to"].as_int()
        case "Dropout":  # Case 3
            training = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
            off = len(node.inputs) < 3 or node.inputs[2] is None or (training is not None and not training.any())
            return off and not any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
        case "Transpose":  # Case 4
            perm = node.attributes.get("perm")
            return perm is not None and list(perm.as_ints()) == list(range(len(perm.as_ints())))
        case "Slice":  # Case 5
            return _takes_everything(node)
    return False


def _takes_everything(node: ir.Node) -> bool:
    """True if a slice has step one and covers each of its axes completely."""
    bounds = [None if value is None else constant_of(value) for value in node.inputs[1:5]]
    if len(bounds) < 2 or bounds[0] is None or bounds[1] is None:
        return False
    whole = not bounds[0].any() and bool((bounds[1] >= _BEYOND).all())
    absent = len(node.inputs) < 5 or node.inputs[4] is None
    return whole and (absent or (bounds[3] is not None and bool((bounds[3] == 1).all())))


def _removable(node: ir.Node, source: ir.Value) -> bool:
    """True if the output can be replaced by the input without renaming a graph input, a weight or an outer value."""
    output = node.outputs[0]
    producer = source.producer()
    inside = producer is not None and producer.graph is node.graph and not source.is_graph_output()
    return inside if output.is_graph_output() else True


def _bypass(node: ir.Node, source: ir.Value) -> None:
    output, graph = node.outputs[0], node.graph
    if graph is None:
        return
    # Graph outputs keep their public names.
    name = output.name if output.is_graph_output() else source.name
    if source.shape is None:
        source.shape = output.shape
    if source.type is None:
        source.type = output.type
    ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    source.name = name
