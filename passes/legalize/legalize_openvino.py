"""Write what OpenVINO's CPU plugin runs fastest.

Before:  o = Attention <scale=0.125> (q, k, v, mask)                                        mask: bool, shared by layers
After:   m = Where (mask, 0, lowest);  h = ReduceMax <keepdims=1> (Where (mask, 1, 0), {-1})
         s = Mul (q, 0.125);  t = Transpose (k);  a = MatMul (s, t);  b = Add (a, m);  p = Softmax (b)
         o = Mul (MatMul (p, v), h)
         m, h as above;  o = Mul (Attention <scale=0.125> (q, k, v, m), h)                  where k comes from a cache

The frontend writes an Attention with a guard behind it, IsNaN and Select over the whole result, in case a query sees no
key, and selects by a boolean mask anew in every layer; the kernel that keeps a cache takes more than three times as
long with one. With the lowest finite number instead of minus infinity there is nothing to guard, and a query that sees
nothing gets its zeros from h, one number a row, which all layers share. The plugin makes one kernel of the five
operators, and of an Attention behind a cache one that keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import name_nodes
from planish.optimizer.ir.graph import FINITE_MASK, location_of, rank_of
from planish.passes.legalize._attention import heads_of, size_of_heads, softcap_of, spell_out
from planish.passes.legalize._masks import AddedMasks, line_of, scale_rows

_KNOWN = frozenset({"scale", "is_causal", "qk_matmul_output_mode", "softcap"})
_RANK = 4
_NAME = "mask_for_openvino"


@dataclass(frozen=True)
class LegalizeOpenVino(Pass):
    """Decompose attention, with one additive mask for all layers.

    1. Attention over keys that are computed in the graph is decomposed.
    2. Attention with a cache, a cap, grouped heads, causal by attribute or of rank three stays one operator, with an
       additive mask. Cache heads that serve several queries are repeated by an Expand, which the plugin's kernel
       fuses; the frontend would repeat them by a Tile, which it does not fuse.
    3. A fully masked row gives zeros, and a NaN row gives NaN, as before. A finite mask masks no row completely.
    """

    name: ClassVar[str] = "legalize-openvino"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        result = PassResult(model, modified=False)
        masks = AddedMasks(model.graph, _NAME)
        for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
            reason, mask = _obstacle(node), node.inputs[3] if len(node.inputs) > 3 else None
            if any(value is not None and value.dtype != ir.DataType.FLOAT for value in node.inputs[:3]):
                result.refusals.append(Refusal.at(node, "its operands are not of type FLOAT", node.outputs[0]))
            elif reason is not None and not _takes_numbers(node, mask):
                result.refusals.append(Refusal.at(node, reason, node.outputs[0]))
            elif admitted():
                result.sites.append(location_of(node))
                added, share = (None, None) if mask is None else (masks.added(mask, node), masks.shares(mask, node))
                if reason is None:
                    spell_out(model.graph, node, added, self.name, share)
                elif added is not None:
                    node.replace_input_with(3, added)
                    # Tells the target to omit the frontend's guard: no row of this mask is NaN.
                    node.metadata_props[FINITE_MASK] = self.name
                    _repeat_heads(model.graph, node)
                    if share is not None:
                        scale_rows(model.graph, node, share)
        result.modified = bool(result.sites)
        return result


def _takes_numbers(node: ir.Node, mask: ir.Value | None) -> bool:
    """Give an attention that stays one operator its additive mask; True if it was changed.

    Excluded: causal order, which may hide keys that the mask shows, and rank three, whose rows differ from the mask's.
    """
    given = mask is not None and mask.dtype == ir.DataType.BOOL and mask.shape is not None
    ordered = node.attributes.get_int("is_causal", 0)
    return given and not ordered and all(rank_of(value) == _RANK for value in node.inputs[:3])


def _repeat_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Repeat cached heads of keys and values for each head of queries."""
    heads, groups = heads_of(node.inputs[0]), heads_of(node.inputs[1])
    if heads is None or groups is None or heads == groups or not all(map(_from_cache, node.inputs[1:3])):
        return
    tape = ir.tape.Tape()
    for place, value in list(enumerate(node.inputs))[1:3]:
        size = size_of_heads(value)
        if value is None or value.shape is None or size is None:
            return
        apart = tape.op("Unsqueeze", [value, line_of(tape, 2)])
        repeated = tape.op("Expand", [apart, line_of(tape, 1, 1, heads // groups, 1, 1)])
        joined = tape.op("Reshape", [repeated, line_of(tape, 0, heads, -1, size)])
        joined.shape, joined.type = ir.Shape([value.shape[0], heads, value.shape[2], size]), value.type
        node.replace_input_with(place, joined)
    name_nodes(tape.nodes, f"{node.outputs[0].name}_heads")
    graph.insert_before(node, tape.nodes)


def _obstacle(node: ir.Node) -> str | None:
    """The reason why an attention stays one operator."""
    query, key = node.inputs[0], node.inputs[1]
    if any(rank_of(value) != _RANK for value in node.inputs[:3]) or query is None or key is None:
        return "its operands are not known to have rank four"
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        return "it keeps a cache"
    # The plugin fuses Attention with its cache only as one operator.
    if _from_cache(key):
        return "its keys come from a cache"
    causal = node.attributes.get("is_causal")
    other = sorted(set(node.attributes) - _KNOWN)
    if causal is not None and causal.as_int():
        return "it is causal without a mask"
    if softcap_of(node):
        return "its scores are capped"
    if other:
        return f"it has the attribute {other[0]}"
    if heads_of(query) != heads_of(key):
        return "its queries and keys differ in heads"
    has_scale = "scale" in node.attributes or size_of_heads(query) is not None
    return None if has_scale else "the size of its heads is not known"


def _from_cache(key: ir.Value | None) -> bool:
    """True if keys are concatenated with those of an input, also before a repetition of heads: a runtime may cache
    them."""
    concat = None if key is None else key.producer()
    # In the order of grouped-query attention, from the attention backwards.
    for repeating in ("Reshape", "Expand", "Unsqueeze"):
        if concat is not None and concat.op_type == repeating and concat.inputs[0] is not None:
            concat = concat.inputs[0].producer()
    return (
        concat is not None
        and concat.op_type == "Concat"
        and any(v is not None and v.is_graph_input() for v in concat.inputs)
    )
