"""Write attention as TensorRT's own operator takes it.

Before:  o = Attention <softcap=50> (q, k, v, mask);  a = Attention (x, y, z, short)          short: [batch, 1, 1, keys]
After:   s = MatMul (q', k');  c = Tanh (s / 50);  …;  o = MatMul (p, v)
         long = Expand (short, {1, 1, queries, 1});  a = Attention (x, y, z, long)

Its operator (IAttention, since 10.14) knows a softmax and no cap, a mask or causal order but not both, and broadcasts a
mask over texts and heads alone. Source: the operator's page in the documentation of TensorRT 10.16. What is written is
of the standard's domain, every type as it was: networks are strongly typed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import name_nodes, rows_for
from planish.optimizer.ir.graph import location_of, rank_of
from planish.passes.legalize._attention import heads_of, size_of_heads, softcap_of, spell_out
from planish.passes.legalize._masks import AddedMasks

_RANK = 4
_ORDER = "is_causal"


@dataclass(frozen=True)
class LegalizeTensorRt(Pass):
    """Decompose attention that TensorRT's operator does not support, and broadcast its masks to a row per query.

    1. Attention with capped scores is decomposed, with grouped queries.
    2. A mask with one row for all queries is broadcast to all of them.
    3. Causal order with a mask, a cache inside, and a mask of a rank other than four are refused.
    """

    name: ClassVar[str] = "legalize-tensorrt"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        result = PassResult(model, modified=False)
        masks = AddedMasks(model.graph, "mask_for_tensorrt")
        for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            reason = _obstacle(node, mask)
            if reason is not None:
                result.refusals.append(Refusal.at(node, reason, node.outputs[0]))
            elif softcap_of(node) and admitted():
                result.sites.append(location_of(node))
                added, share = (None, None) if mask is None else (masks.added(mask, node), masks.shares(mask, node))
                spell_out(model.graph, node, added, self.name, share)
            elif not softcap_of(node) and mask is not None and _spread(model.graph, node, mask):
                result.sites.append(location_of(node))
        result.modified = bool(result.sites)
        return result


def _obstacle(node: ir.Node, mask: ir.Value | None) -> str | None:
    """The reason why TensorRT could not run the result."""
    order = node.attributes.get(_ORDER)
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        return "it keeps a cache inside"
    if mask is not None and order is not None and order.as_int():
        return "it is causal beside a mask"
    query, key, value = node.inputs[:3]
    if not softcap_of(node):
        unknown = mask is not None and (rank_of(query) != _RANK or rank_of(mask) != _RANK)
        return "its queries or its mask are not known to have rank four" if unknown else None
    if any(rank_of(one) != _RANK or one is None or one.dtype != ir.DataType.FLOAT for one in (query, key, value)):
        return "its scores are capped, and its operands are not known to be of type FLOAT and rank four"
    if None in (heads_of(query), heads_of(key), size_of_heads(query), size_of_heads(value)):
        return "its scores are capped, and its heads are not known"
    shared = mask is None or (mask.shape is not None and len(mask.shape) == _RANK and mask.shape[1] == 1)
    if (order is not None and order.as_int()) or not shared:
        return "its scores are capped, and its mask is not one for all heads"
    return None


def _spread(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> bool:
    """Case 2: broadcast the mask; True if it had one row."""
    spread, nodes = (mask, []) if node.inputs[0] is None else rows_for(node.inputs[0], mask)
    if not nodes or not admitted():
        return False
    name_nodes(nodes, f"{node.outputs[0].name}_mask")
    spread.type = mask.type
    graph.insert_before(node, nodes)
    node.replace_input_with(3, spread)
    return True
