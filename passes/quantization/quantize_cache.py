"""Keep a cache of keys and values in 8 bits, with a scale for each token and head.

Before:  present = Concat <axis=2> (past, k);  r = Attention (q, present, …)
After:   s = Max (Mul (ReduceMax <keepdims=1> (Abs (k), {-1}), {1/127}), {tiny})
         k8 = Cast <to=INT8> (Round (Div (k, s)))
         present = Concat <axis=2> (past, k8);  present.scale = Concat <axis=2> (past.scale, s)           int8, float
         f = Mul (Cast <to=FLOAT> (present), present.scale);  r = Attention (q, f, …)

Symmetric around zero; scales are found as tokens come, so nothing is calibrated, and what a token was rounded to never
changes: a cache may be cut, repeated and put in another order as before. One that is only read (an encoder's) or only
written (by the first step) likewise; attention that keeps its cache inside gives it away first. DequantizeLinear with
scales of blocks says the same in one operator; ONNX Runtime took up to twice as long for a step with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import add_initializer, copy_location, remove_dead
from planish.optimizer.ir.graph import opset_of, producer_of, subgraphs_of
from planish.optimizer.ir.kv_cache import (
    CACHE_SCALE,
    INT8_STEPS,
    PAST_NAME,
    PRESENT_NAME,
    SMALLEST_SCALE,
    is_cache_scale,
)
from planish.passes._flat_attention import appends, spread

_RANK, _TOKENS, _ENTRIES = 4, 2, 3
"""Of (batch, heads, tokens, entries), and two of its axes."""
_SINCE = 18
"""The opset whose ReduceMax takes its axes as an input."""
_ABOUT_SHAPES = ("Shape", "Size")


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Take, keep and give keys and values of earlier tokens in 8 bits: for memory, not for speed."""

    name: ClassVar[str] = "quantize-cache"
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite what the main graph takes and gives."""
        result = PassResult(model, modified=False)
        graph = model.graph
        for values, prefix, rewrite in ((graph.inputs, PAST_NAME, _take), (graph.outputs, PRESENT_NAME, _give)):
            for name in [value.name or "" for value in values]:
                value = next(value for value in values if value.name == name)  # the one before may have changed it
                in_8_bits = is_cache_scale(name) or any(other.name == f"{name}{CACHE_SCALE}" for other in values)
                if in_8_bits or not name.startswith(prefix):
                    continue
                reason = _obstacle(model, value, _shape(graph, value))
                if reason is not None:
                    result.refusals.append(Refusal(name, reason, name))
                elif admitted():
                    result.sites.append(name)
                    rewrite(graph, value)
        result.modified = bool(result.sites)
        return result


def _shape(graph: ir.Graph, value: ir.Value) -> ir.Shape | None:
    """The shape of a tensor of the cache: files say of what they give how many heads of which size there are, and may
    leave it open of what they take."""
    name = (value.name or "").replace(PAST_NAME, PRESENT_NAME, 1)
    own, given = value.shape, next((other.shape for other in graph.outputs if other.name == name), value.shape)
    if own is None or given is None or len(own) != _RANK or len(given) != _RANK:
        return own
    return ir.Shape([own[0], given[1], own[_TOKENS], given[_ENTRIES]])


def _obstacle(model: ir.Model, value: ir.Value, shape: ir.Shape | None) -> str | None:
    """Why a tensor of the cache stays as it is."""
    if value.dtype is not ir.DataType.FLOAT:
        return "it is not of type FLOAT"
    if opset_of(model) < _SINCE:
        return f"the model is written in opset {opset_of(model)}, ReduceMax takes axes since {_SINCE}"
    if shape is None or len(shape) != _RANK:
        return "its shape is not known to be (batch, heads, tokens, entries)"
    return None


def _take(graph: ir.Graph, past: ir.Value) -> None:
    """Let the graph take a tensor in 8 bits and its scales, and whoever reads it read it made real."""
    past.type, past.shape = ir.TensorType(ir.DataType.INT8), _shape(graph, past)
    name = f"{past.name}{CACHE_SCALE}"
    scale = ir.Value(name=name, shape=_of_scales(past), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.insert(graph.inputs.index(past) + 1, scale)
    readers = {use.node for use in past.uses() if use.node.op_type not in _ABOUT_SHAPES}
    inside = {reader.graph for reader in readers}  # a branch may read it before anything of the main graph does
    first = next((node for node in graph if node in readers or not inside.isdisjoint(_graphs_in(node))), graph[0])
    graph.insert_before(first, _made_real(past, scale))


def _graphs_in(node: ir.Node) -> set[ir.Graph | ir.Function | None]:
    """The subgraphs of a node, and those below them."""
    return {inner for graph in subgraphs_of(node) for inner in (graph, *graph.subgraphs())}


def _give(graph: ir.Graph, present: ir.Value) -> None:
    """Let the graph give a tensor in 8 bits and its scales: new tokens behind the old, or all of them at once."""
    name, index = present.name or "", graph.outputs.index(present)
    attention = producer_of(present, "Attention")
    if attention is not None and spread(graph, attention):
        present = graph.outputs[index]
    concat = producer_of(present, "Concat")
    old, new = (None, None) if concat is None or not appends(concat) else concat.inputs
    found = _of_cache(old)
    if concat is not None and found is not None and new is not None:
        scale = _append(graph, concat, found, new)
    else:
        present.name = f"{name}_whole"
        stored, scale = _rounded(graph, present, name)
        stored.name, graph.outputs[index] = name, stored
    scale.name = f"{name}{CACHE_SCALE}"
    graph.outputs.insert(index + 1, scale)


def _append(graph: ir.Graph, concat: ir.Node, old: tuple[ir.Value, ir.Node], new: ir.Value) -> ir.Value:
    """Put new tokens behind a cache in 8 bits where they stood behind it made real; the scales of all."""
    present, name = concat.outputs[0], concat.outputs[0].name or ""
    fresh, fresh_scale = _rounded(graph, new, name)
    past, real = old
    past_scale = real.inputs[1]
    concat.replace_input_with(0, past)
    concat.replace_input_with(1, fresh)
    remove_dead(graph, real)
    scales = ir.node("Concat", [past_scale, fresh_scale], dict(concat.attributes), name=f"{name}_scales")
    scale = scales.outputs[0]
    scale.shape, scale.type = _of_scales(present), ir.TensorType(ir.DataType.FLOAT)
    present.type = ir.TensorType(ir.DataType.INT8)
    nodes = [scales, *_made_real(present, scale)]
    copy_location(concat, *nodes)
    graph.insert_after(concat, nodes)
    return scale


def _rounded(graph: ir.Graph, value: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Tokens in 8 bits, and their scales."""
    constants = [
        add_initializer(graph, f"{name}_{what}", array)
        for what, array in (
            ("axes", np.array([-1], np.int64)),
            ("steps", np.array(1 / INT8_STEPS)),
            ("smallest", np.array(SMALLEST_SCALE)),
        )
    ]
    tape = ir.tape.Tape()
    size = tape.op("Abs", [value])
    largest = tape.op("ReduceMax", [size, constants[0]], {"keepdims": 1})
    wide = tape.op("Mul", [largest, constants[1]])
    scale = tape.op("Max", [wide, constants[2]])
    parts = tape.op("Div", [value, scale])
    rounded = tape.op("Round", [parts])
    stored = tape.op("Cast", [rounded], {"to": ir.DataType.INT8})
    for node, what in zip(tape.nodes, ("size", "largest", "wide", "scale", "parts", "rounded", "int8"), strict=True):
        node.name = node.outputs[0].name = f"{name}_{what}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = None if value.shape is None else _of_scales(value)
    for each in (size, parts, rounded, stored):
        each.shape = value.shape
    stored.type = ir.TensorType(ir.DataType.INT8)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        copy_location(producer, *tape.nodes)
        graph.insert_after(producer, tape.nodes)
    return stored, scale


def _made_real(stored: ir.Value, scale: ir.Value) -> list[ir.Node]:
    """What makes a tensor of the cache real for those who read it, if any do more than ask for its shape."""
    uses = [use for use in stored.uses() if use.node.op_type not in _ABOUT_SHAPES]
    if not uses:
        return []
    tape = ir.tape.Tape()
    cast = tape.op("Cast", [stored], {"to": ir.DataType.FLOAT})
    real = tape.op("Mul", [cast, scale])
    for value, what in ((cast, "float"), (real, "real")):
        value.name, value.shape, value.type = f"{stored.name}_{what}", stored.shape, ir.TensorType(ir.DataType.FLOAT)
    for node in tape.nodes:
        node.name = node.outputs[0].name
    for use in uses:
        use.node.replace_input_with(use.idx, real)
    return list(tape.nodes)


def _of_cache(value: ir.Value | None) -> tuple[ir.Value, ir.Node] | None:
    """A tensor that the graph takes in 8 bits, and what made this value of it."""
    real = producer_of(value, "Mul")
    cast = None if real is None else producer_of(real.inputs[0], "Cast")
    taken = None if cast is None else cast.inputs[0]
    if real is None or taken is None or not taken.is_graph_input() or not (taken.name or "").startswith(PAST_NAME):
        return None
    return taken, real


def _of_scales(value: ir.Value) -> ir.Shape:
    """The shape of a tensor of the cache with one entry instead of its own."""
    return ir.Shape([*_sizes(value)[:_ENTRIES], 1])


def _sizes(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise ValueError(f"{value.name!r} was not checked")
    return value.shape
