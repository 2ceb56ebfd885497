"""Attention that takes what projections give, (batch, tokens, hidden), and puts keys and values behind a cache itself.

Before:  a = Reshape (q, {0,0,12,64});  b = Transpose <perm=[0,2,1,3]> (a);  c = RotaryEmbedding (b, cos, sin);  …
         present_k = Concat <axis=2> (past_k, …);  …;  o = Attention (c, present_k, present_v, mask)
         p = Transpose <perm=[0,2,1,3]> (o);  r = Reshape (p, {0,0,768})
After:   c = RotaryEmbedding <num_heads=12> (q, cos, sin);  …
         r, present_k, present_v = Attention <q_num_heads=12, kv_num_heads=12> (c, …, mask, past_k, past_v)

ONNX: Attention and RotaryEmbedding, opset 23, for operands of rank three.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Refusal, admitted
from planish.optimizer.ir.edit import add_initializer, copy_location, name_nodes, remove_dead, replace_value
from planish.optimizer.ir.graph import constant_of, producer_of, rank_of, sole_user

_QUERY, _KEY, _VALUE, _MASK = range(4)


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values of an attention, with the nodes that produced them."""

    split: ir.Value
    """(batch, tokens, heads, size)"""
    heads: int
    rotary: ir.Node | None
    """The RotaryEmbedding of the operand, or None."""
    concat: ir.Node | None
    """The Concat with a KV cache, or None."""

    @property
    def past(self) -> ir.Value | None:
        """The past keys or values in that Concat."""
        return None if self.concat is None else self.concat.inputs[0]


def flatten(graph: ir.Graph, node: ir.Node) -> ir.Node | Refusal | None:
    """Replace an attention between transpositions by one on operands of rank three; returns it, or the refusal.

    None if there are no such transpositions, or if no more sites may be rewritten.
    """
    if len(node.outputs) != 1 or "q_num_heads" in node.attributes or len(node.inputs) > _MASK + 1:
        return None
    candidates, joined = map(_operand, node.inputs[:_MASK]), _joined(node.outputs[0])
    operands = [operand for operand in candidates if operand is not None]
    # All three operands must come from splits into heads: the operator has one layout for all.
    if joined is None or len(operands) < _MASK:
        return None
    obstacle = _obstacle(node, operands)
    if obstacle is not None:
        return Refusal.at(node, *obstacle)
    if not admitted():
        return None
    pasts = [operand.past for operand in operands if operand.past is not None]
    masked = node.inputs[_MASK:] or [None] * bool(pasts)
    flat = ir.node(
        "Attention",
        [*(_flat(graph, node, operand) for operand in operands), *masked, *pasts],
        {**node.attributes, "q_num_heads": operands[_QUERY].heads, "kv_num_heads": operands[_KEY].heads},
        num_outputs=1 + len(pasts),
        name=f"{node.name}_flat",
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, flat)
    replace_value(joined[-1].outputs[0], flat.outputs[0], "split")
    remove_dead(graph, joined[-1])
    for operand, present in zip(operands[_KEY:], flat.outputs[1:], strict=False):
        if operand.concat is not None:
            replace_value(operand.concat.outputs[0], present, "outside")
            remove_dead(graph, operand.concat)
    return flat


def _operand(value: ir.Value | None) -> Operand | None:
    """An operand of an attention: split into heads, transposed, optionally rotated and concatenated with a cache."""
    concat = producer_of(value, "Concat")
    if concat is not None and not appends(concat):
        return None
    inner = value if concat is None else concat.inputs[1]
    rotary = producer_of(inner, "RotaryEmbedding")
    inner = inner if rotary is None else rotary.inputs[0]
    transpose = producer_of(inner, "Transpose")
    split = None if transpose is None or not _swaps_heads(transpose) else transpose.inputs[0]
    heads = None if split is None else _heads(split)
    return None if split is None or heads is None else Operand(split, heads, rotary, concat)


def _obstacle(node: ir.Node, operands: list[Operand]) -> tuple[str, ir.Value | ir.Node] | None:
    """Reason and culprit if an attention cannot read its operands before the split into heads."""
    query, key, value = operands
    causal = node.attributes.get("is_causal")
    if query.concat is not None or (key.concat is None) != (value.concat is None):
        return "not its keys and values alone are put behind a cache, and both", node
    if key.heads != value.heads:
        return "its keys and values differ in heads", value.split
    if key.concat is not None and causal is not None and causal.as_int():
        return "its causal mask counts from the first key, inside it would count from the end of the cache", node
    for operand in operands:
        for producer, reader in ((operand.concat, node), (operand.rotary, operand.concat or node)):
            if producer is not None and [use.node for use in producer.outputs[0].uses()] != [reader]:
                return "others read what would be inside", producer.outputs[0]
    if any(one.rotary is not None and one.rotary.outputs[0].is_graph_output() for one in operands):
        return "what is turned by positions leaves the graph", node
    return None


def _flat(graph: ir.Graph, node: ir.Node, operand: Operand) -> ir.Value:
    """An operand as (batch, tokens, heads · size), before an attention."""
    reshape, rotary = _splitting(operand.split), operand.rotary
    source = None if reshape is None else reshape.inputs[0]
    source = _joined_heads(graph, node, operand) if source is None else source
    if rotary is None:
        return source
    turned = ir.node(
        "RotaryEmbedding",
        [source, *rotary.inputs[1:]],
        {**rotary.attributes, "num_heads": operand.heads},
        name=f"{rotary.name}_flat",
        metadata_props=dict(rotary.metadata_props),
    )
    output = turned.outputs[0]
    output.name, output.shape, output.type = f"{rotary.outputs[0].name}_flat", source.shape, source.type
    graph.insert_before(node, turned)
    return output


def _joined_heads(graph: ir.Graph, node: ir.Node, operand: Operand) -> ir.Value:
    """(batch, tokens, heads, size) that no split produced, with its heads merged."""
    shape, name = operand.split.shape, f"{operand.split.name}_joined"
    if shape is None or not isinstance(shape[3], int):
        raise ValueError(f"{operand.split.name!r} was not checked")
    width = operand.heads * shape[3]
    target = add_initializer(graph, f"{name}_shape", np.array([0, 0, width], np.int64))
    reshape = ir.node("Reshape", [operand.split, target], name=name)
    output = reshape.outputs[0]
    output.name, output.shape, output.type = name, ir.Shape([*shape[:2], width]), operand.split.type
    copy_location(node, reshape)
    graph.insert_before(node, reshape)
    return output


def _heads(split: ir.Value) -> int | None:
    """The number of heads of (batch, tokens, heads, size): from the Reshape of rank three, or from the shape."""
    shape, reshape = [] if split.shape is None else list(split.shape), _splitting(split)
    heads, size = shape[2:] if len(shape) == 4 else (None, None)
    target = None if reshape is None else constant_of(reshape.inputs[1])
    if target is not None and target[2] > 0:
        return int(target[2])
    has_heads = isinstance(size, int) or reshape is not None
    return heads if isinstance(heads, int) and has_heads else None


def _splitting(value: ir.Value) -> ir.Node | None:
    """The Reshape that split the last axis of (batch, tokens, hidden), if it produced ``value``."""
    reshape = producer_of(value, "Reshape")
    target = None if reshape is None else constant_of(reshape.inputs[1])
    keeps = target is not None and target.size == 4 and list(target[:2]) == [0, 0]
    return reshape if keeps and reshape is not None and rank_of(reshape.inputs[0]) == 3 else None


def _joined(output: ir.Value) -> list[ir.Node] | None:
    """The Transpose and Reshape that merge the heads of an output."""
    transpose = sole_user(output)
    reshape = None if transpose is None else sole_user(transpose.outputs[0])
    if transpose is None or reshape is None or not _swaps_heads(transpose) or reshape.op_type != "Reshape":
        return None
    target = constant_of(reshape.inputs[1])
    joins = target is not None and target.size == 3 and list(target[:2]) == [0, 0]
    return [transpose, reshape] if joins else None


def _swaps_heads(node: ir.Node) -> bool:
    """True if a node swaps the two middle axes of four; without `perm` a Transpose reverses all axes."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and list(perm.as_ints()) == [0, 2, 1, 3]


def appends(concat: ir.Node) -> bool:
    """True if a node concatenates along tokens, axis 2 of four, after another value."""
    axis = concat.attributes.get("axis")
    return len(concat.inputs) == 2 and axis is not None and axis.as_int() in (2, -2) and rank_of(concat.inputs[0]) == 4


def spread(graph: ir.Graph, node: ir.Node) -> bool:
    """Move the cache out of an attention that `flatten` wrote: the inverse of its cache fusion.

    The present keys and values become a Concat before it. False, with the graph unchanged, for other attention.
    """
    causal = node.attributes.get_int("is_causal", 0)
    heads = [node.attributes.get_int(f"{kind}_num_heads", 0) for kind in ("q", "kv")]
    pasts = node.inputs[_MASK + 1 :]
    if len(pasts) != 2 or None in pasts or len(node.outputs) != 3 or causal or not all(heads):
        return False
    tape = ir.tape.Tape()
    split = [
        _split(graph, tape, value, heads[index > 0], f"{node.name}_{what}")
        for index, (value, what) in enumerate(zip(node.inputs[:_MASK], ("query", "key", "value"), strict=True))
    ]
    joined = [tape.op("Concat", [past, new], {"axis": 2}) for past, new in zip(pasts, split[1:], strict=True)]
    attributes = {name: each for name, each in node.attributes.items() if not name.endswith("_num_heads")}
    apart = tape.op("Attention", [split[0], *joined, node.inputs[_MASK]], attributes)
    turned = tape.op("Transpose", [apart], {"perm": [0, 2, 1, 3]})
    flat = add_initializer(graph, f"{node.name}_joined", np.array([0, 0, -1], np.int64))
    result = tape.op("Reshape", [turned, flat])
    name_nodes(tape.nodes, f"{node.name}_apart")
    copy_location(node, *tape.nodes)
    graph.insert_before(node, tape.nodes)
    for old, new in zip(node.outputs, (result, *joined), strict=True):
        replace_value(old, new, "inside")
    remove_dead(graph, node)
    return True


def _split(graph: ir.Graph, tape: ir.tape.Tape, value: ir.Value | None, heads: int, name: str) -> ir.Value:
    """(batch, heads, tokens, size) of (batch, tokens, heads · size)."""
    shape = add_initializer(graph, f"{name}_split", np.array([0, 0, heads, -1], np.int64))
    return tape.op("Transpose", [tape.op("Reshape", [value, shape])], {"perm": [0, 2, 1, 3]})
