"""Write what OpenVINO's CPU plugin runs fastest.

Before:  o = Attention <scale=0.125> (q, k, v, mask)                                        mask: bool, shared by layers
After:   m = Where (mask, 0, lowest);  s = Mul (q, 0.125);  t = Transpose (k);  a = MatMul (s, t);  b = Add (a, m)
         p = Softmax (b);  o = MatMul (p, v)
         m = Where (mask, 0, lowest);  o = Attention <scale=0.125> (q, k, v, m)             where k comes from a cache

The frontend writes an Attention with a guard behind it, IsNaN and Select over the whole result, in case a query sees no
key, and selects by a boolean mask anew in every layer; the kernel that keeps a cache takes more than three times as
long with one. With the lowest finite number instead of minus infinity there is nothing to guard: a query that sees
nothing gets the mean of what it must not see, and means as little as before. The plugin makes one kernel of the five
operators, and of an Attention behind a cache one that keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.base import Pass, PassResult, Refusal, admitted
from planish.optimizer.graph import NAME_SCOPES, SPELLED_OUT, location_of, name_nodes, rank_of

_KNOWN = frozenset({"scale", "is_causal", "qk_matmul_output_mode", "softcap"})
_RANK = 4
_NAME = "mask_for_openvino"


@dataclass(frozen=True)
class LegalizeOpenVino(Pass):
    """Spell attention out again, with one mask of numbers for all layers.

    1. Attention over keys that are computed here is spelled out.
    2. Attention behind a cache, capped, with grouped heads, causal by attribute or of rank three stays one operator,
       and gets the mask of numbers.
    3. A mask that is given, not computed from one of tokens, is left as it is: a row that hides everything may count.
    """

    name: ClassVar[str] = "legalize-openvino"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        result = PassResult(model, modified=False)
        masks = _Masks(model.graph)
        for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
            reason, mask = _obstacle(node), node.inputs[3] if len(node.inputs) > 3 else None
            if any(value is not None and value.dtype != ir.DataType.FLOAT for value in node.inputs[:3]):
                result.refusals.append(Refusal.at(node, "its operands are not of type FLOAT", node.outputs[0]))
            elif mask is not None and mask.producer() is None:
                result.refusals.append(Refusal.at(node, "its mask is given, rows that hide everything may count", mask))
            elif reason is not None and (mask is None or mask.dtype != ir.DataType.BOOL or mask.shape is None):
                result.refusals.append(Refusal.at(node, reason, node.outputs[0]))
            elif admitted():
                result.sites.append(location_of(node))
                if reason is None:
                    _spell_out(model.graph, node, masks)
                elif mask is not None:
                    node.replace_input_with(3, masks.added(mask, node))
        result.modified = bool(result.sites)
        return result


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
    softcap = node.attributes.get("softcap")
    other = sorted(set(node.attributes) - _KNOWN)
    if causal is not None and causal.as_int():
        return "it is causal without a mask"
    if softcap is not None and softcap.as_float():
        return "its scores are capped"
    if other:
        return f"it has the attribute {other[0]}"
    heads = (None if value.shape is None else value.shape[1] for value in (query, key))
    if len({*heads}) > 1:
        return "its queries and keys differ in heads"
    size = None if query.shape is None else query.shape[3]
    return None if "scale" in node.attributes or isinstance(size, int) else "the size of its heads is not known"


def _from_cache(key: ir.Value) -> bool:
    """Whether keys are put behind those of an input: a runtime may keep them."""
    concat = key.producer()
    return (
        concat is not None
        and concat.op_type == "Concat"
        and any(v is not None and v.is_graph_input() for v in concat.inputs)
    )


@dataclass
class _Masks:
    """Each mask as numbers to be added, made once."""

    graph: ir.Graph
    made: dict[int, ir.Value] = field(default_factory=dict)

    def added(self, mask: ir.Value, reader: ir.Node) -> ir.Value:
        """What is added to scores: 0 where a key is seen, else the lowest finite number."""
        if id(mask) not in self.made:
            tape = ir.tape.Tape()
            lowest = _number(tape, float(np.finfo(np.float32).min))
            if mask.dtype == ir.DataType.BOOL:
                added = tape.op("Where", [mask, _number(tape, 0.0), lowest])
            else:  # minus infinity may stand in it
                added = tape.op("Max", [mask, lowest])
            added.shape, added.type = mask.shape, ir.TensorType(ir.DataType.FLOAT)
            name = _NAME if not self.made else f"{_NAME}_{len(self.made)}"
            name_nodes(tape.nodes, name)
            added.name = name
            self.graph.insert_before(reader, tape.nodes)
            self.made[id(mask)] = added
        return self.made[id(mask)]


def _spell_out(graph: ir.Graph, node: ir.Node, masks: _Masks) -> None:
    query, key, value = node.inputs[0], node.inputs[1], node.inputs[2]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if query is None or key is None or value is None or query.shape is None or key.shape is None:
        raise ValueError(f"{node.name!r} was not checked")
    old, size = node.outputs[0], query.shape[3]
    written = node.attributes.get("scale")
    scale = written.as_float() if written is not None else float(np.asarray(size, np.float32)) ** -0.5
    added = None if mask is None else masks.added(mask, node)
    tape = ir.tape.Tape()
    scaled = tape.op("Mul", [query, _number(tape, scale)])
    turned = tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})
    scores = tape.op("MatMul", [scaled, turned])
    masked = scores if added is None else tape.op("Add", [scores, added])
    weights = tape.op("Softmax", [masked], {"axis": -1})
    result = tape.op("MatMul", [weights, value])
    kind = ir.TensorType(ir.DataType.FLOAT)
    table = ir.Shape([*query.shape[:3], key.shape[2]])
    shapes = {scaled: query.shape, turned: ir.Shape([*key.shape[:2], key.shape[3], key.shape[2]]), result: old.shape}
    for made in (scaled, turned, scores, masked, weights, result):
        made.shape, made.type = shapes.get(made, table), kind
    name_nodes(tape.nodes, f"{old.name}_spelled_out")
    for new in tape.nodes:
        new.metadata_props[SPELLED_OUT] = LegalizeOpenVino.name
        if NAME_SCOPES in node.metadata_props:
            new.metadata_props[NAME_SCOPES] = node.metadata_props[NAME_SCOPES]
    graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    name = old.name
    old.name, result.name = f"{name}_whole", name


def _number(tape: ir.tape.Tape, number: float) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(number, np.float32))})
