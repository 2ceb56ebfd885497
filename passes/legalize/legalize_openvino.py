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
    """Spell attention out again, with one mask of numbers for all layers.

    1. Attention over keys that are computed here is spelled out.
    2. Attention behind a cache, capped, with grouped heads, causal by attribute or of rank three stays one operator,
       and gets the mask of numbers. Heads of a cache that serve several queries are repeated by an Expand, which the
       plugin's kernel takes in; the frontend would repeat them by a Tile, which it does not.
    3. A row of a mask that hides everything gives zeros, as before; one that is NaN gives NaN. A mask of finite numbers
       hides nothing.
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
                    node.metadata_props[FINITE_MASK] = self.name
                    _repeat_heads(model.graph, node)
                    if share is not None:
                        scale_rows(model.graph, node, share)
        result.modified = bool(result.sites)
        return result


def _takes_numbers(node: ir.Node, mask: ir.Value | None) -> bool:
    """Whether an attention that stays one operator gets its mask in numbers.

    Not beside causal order, which may hide what the mask shows, nor of rank three, whose rows are not the mask's.
    """
    given = mask is not None and mask.dtype == ir.DataType.BOOL and mask.shape is not None
    ordered = node.attributes.get_int("is_causal", 0)
    return given and not ordered and all(rank_of(value) == _RANK for value in node.inputs[:3])


def _repeat_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Give each head of queries its head of keys and values, where those come from a cache."""
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
    """Why an attention stays one operator."""
    query, key = node.inputs[0], node.inputs[1]
    if any(rank_of(value) != _RANK for value in node.inputs[:3]) or query is None or key is None:
        return "its operands are not known to have rank four"
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        return "it keeps a cache"
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
    known = "scale" in node.attributes or size_of_heads(query) is not None
    return None if known else "the size of its heads is not known"


def _from_cache(key: ir.Value | None) -> bool:
    """Whether keys are put behind those of an input, also if heads were repeated since: a runtime may keep them."""
    concat = None if key is None else key.producer()
    for repeating in ("Reshape", "Expand", "Unsqueeze"):
        if concat is not None and concat.op_type == repeating and concat.inputs[0] is not None:
            concat = concat.inputs[0].producer()
    return (
        concat is not None
        and concat.op_type == "Concat"
        and any(v is not None and v.is_graph_input() for v in concat.inputs)
    )
