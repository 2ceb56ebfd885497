"""Keep the KV cache in 8 bits, with a scale for each token and head.

Before:  present = Concat <axis=2> (past, k);  r = Attention (q, present, …)
After:   s = Max (Mul (ReduceMax <keepdims=1> (Abs (k), {-1}), {1/127}), {tiny})
         k8 = Cast <to=INT8> (Round (Div (k, s)))
         present = Concat <axis=2> (past, k8);  present.scale = Concat <axis=2> (past.scale, s)           int8, float
         f = Mul (Cast <to=FLOAT> (present), present.scale);  r = Attention (q, f, …)

Symmetric around zero; the engine computes the scales of new tokens, so nothing is calibrated. The integers of a token
never change: a cache may be cut, repeated and reordered as before. A cache that is only read (an encoder's) or only
written (by the first step) is treated alike; that of Attention is moved out of the operator first. DequantizeLinear
with scales of blocks is the same in one operator; with it, a step of ONNX Runtime took up to twice as long.
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
"""Rank of (batch, heads, tokens, entries), and two of its axes."""
_OPSET = 18
"""The first opset whose ReduceMax has axes as an input."""
_SHAPE_READERS = ("Shape", "Size")
"""Operators that read the shape of a tensor alone, which quantization does not change."""


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Read, keep and return the keys and values of earlier tokens in 8 bits: for memory, not for speed."""

    name: ClassVar[str] = "quantize-cache"
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the cache inputs and outputs of the main graph."""
        result = PassResult(model, modified=False)
        graph = model.graph
        for values, prefix, rewrite in (
            (graph.inputs, PAST_NAME, _quantize_input),
            (graph.outputs, PRESENT_NAME, _quantize_output),
        ):
            for name in [value.name or "" for value in values]:
                # By name: quantizing one output may replace the value of another.
                value = next(value for value in values if value.name == name)
                in_8_bits = is_cache_scale(name) or any(other.name == f"{name}{CACHE_SCALE}" for other in values)
                if in_8_bits or not name.startswith(prefix):
                    continue
                reason = _unsupported(model, value, _shape(graph, value))
                if reason is not None:
                    result.refusals.append(Refusal(name, reason, name))
                elif admitted():
                    result.sites.append(name)
                    rewrite(graph, value)
        result.modified = bool(result.sites)
        return result


def _shape(graph: ir.Graph, value: ir.Value) -> ir.Shape | None:
    """The shape of a cache tensor, with the heads and entries of the output that corresponds to an input.

    ONNX files of others may leave these two dynamic in inputs.
    """
    name = (value.name or "").replace(PAST_NAME, PRESENT_NAME, 1)
    shape, output = value.shape, next((other.shape for other in graph.outputs if other.name == name), value.shape)
    if shape is None or output is None or len(shape) != _RANK or len(output) != _RANK:
        return shape
    return ir.Shape([shape[0], output[1], shape[_TOKENS], output[_ENTRIES]])


def _unsupported(model: ir.Model, value: ir.Value, shape: ir.Shape | None) -> str | None:
    """Reason why a cache tensor stays in float; None if it need not."""
    if value.dtype is not ir.DataType.FLOAT:
        return "it is not of type FLOAT"
    if opset_of(model) < _OPSET:
        return f"the model is written in opset {opset_of(model)}, ReduceMax takes axes since {_OPSET}"
    if shape is None or len(shape) != _RANK:
        return "its shape is not known to be (batch, heads, tokens, entries)"
    return None


def _quantize_input(graph: ir.Graph, past: ir.Value) -> None:
    """Change an input to 8 bits, add an input for its scales, and dequantize it for its readers."""
    past.type, past.shape = ir.TensorType(ir.DataType.INT8), _shape(graph, past)
    name = f"{past.name}{CACHE_SCALE}"
    scale = ir.Value(name=name, shape=_shape_of_scales(past), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.insert(graph.inputs.index(past) + 1, scale)
    readers = {use.node for use in past.uses() if use.node.op_type not in _SHAPE_READERS}
    # The first reader may be in a branch: the nodes then go before the If that holds it.
    inside = {reader.graph for reader in readers}
    first = next((node for node in graph if node in readers or not inside.isdisjoint(_graphs_in(node))), graph[0])
    graph.insert_before(first, _dequantize(past, scale))


def _graphs_in(node: ir.Node) -> set[ir.Graph | ir.Function | None]:
    """The subgraphs of a node, and those below them."""
    return {inner for graph in subgraphs_of(node) for inner in (graph, *graph.subgraphs())}


def _quantize_output(graph: ir.Graph, present: ir.Value) -> None:
    """Change an output to 8 bits and add one for its scales; quantize new tokens alone if old ones are in 8 bits."""
    name, index = present.name or "", graph.outputs.index(present)
    attention = producer_of(present, "Attention")
    if attention is not None and spread(graph, attention):
        present = graph.outputs[index]
    concat = producer_of(present, "Concat")
    old, new = (None, None) if concat is None or not appends(concat) else concat.inputs
    past = _dequantized_past(old)
    if concat is not None and past is not None and new is not None:
        # Old tokens keep their integers: quantizing all tokens at each step would take time that grows with the cache.
        scale = _append(graph, concat, past, new)
    else:
        present.name = f"{name}_whole"
        integers, scale = _quantize(graph, present, name)
        integers.name, graph.outputs[index] = name, integers
    scale.name = f"{name}{CACHE_SCALE}"
    graph.outputs.insert(index + 1, scale)


def _append(graph: ir.Graph, concat: ir.Node, dequantized: tuple[ir.Value, ir.Node], new: ir.Value) -> ir.Value:
    """Concatenate integers instead of floats, and scales likewise; returns the scales of all tokens."""
    present, name = concat.outputs[0], concat.outputs[0].name or ""
    new_integers, new_scale = _quantize(graph, new, name)
    past, mul = dequantized
    past_scale = mul.inputs[1]
    concat.replace_input_with(0, past)
    concat.replace_input_with(1, new_integers)
    remove_dead(graph, mul)
    scales = ir.node("Concat", [past_scale, new_scale], dict(concat.attributes), name=f"{name}_scales")
    scale = scales.outputs[0]
    scale.shape, scale.type = _shape_of_scales(present), ir.TensorType(ir.DataType.FLOAT)
    present.type = ir.TensorType(ir.DataType.INT8)
    nodes = [scales, *_dequantize(present, scale)]
    copy_location(concat, *nodes)
    graph.insert_after(concat, nodes)
    return scale


def _quantize(graph: ir.Graph, value: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Tokens in 8 bits, and their scales."""
    constants = [
        add_initializer(graph, f"{name}_{suffix}", array)
        for suffix, array in (
            ("axes", np.array([-1], np.int64)),
            ("steps", np.array(1 / INT8_STEPS)),
            ("smallest", np.array(SMALLEST_SCALE)),
        )
    ]
    tape = ir.tape.Tape()
    magnitude = tape.op("Abs", [value])
    largest = tape.op("ReduceMax", [magnitude, constants[0]], {"keepdims": 1})
    step = tape.op("Mul", [largest, constants[1]])
    # A lower limit: tokens of zeros, such as padding, would be divided by zero.
    scale = tape.op("Max", [step, constants[2]])
    quotient = tape.op("Div", [value, scale])
    rounded = tape.op("Round", [quotient])
    integers = tape.op("Cast", [rounded], {"to": ir.DataType.INT8})
    suffixes = ("size", "largest", "wide", "scale", "parts", "rounded", "int8")
    for node, suffix in zip(tape.nodes, suffixes, strict=True):
        node.name = node.outputs[0].name = f"{name}_{suffix}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = None if value.shape is None else _shape_of_scales(value)
    for entrywise in (magnitude, quotient, rounded, integers):
        entrywise.shape = value.shape
    integers.type = ir.TensorType(ir.DataType.INT8)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        copy_location(producer, *tape.nodes)
        graph.insert_after(producer, tape.nodes)
    return integers, scale


def _dequantize(integers: ir.Value, scale: ir.Value) -> list[ir.Node]:
    """Nodes that dequantize a cache tensor for its readers; none if it has no reader but of its shape."""
    uses = [use for use in integers.uses() if use.node.op_type not in _SHAPE_READERS]
    if not uses:
        return []
    tape = ir.tape.Tape()
    cast = tape.op("Cast", [integers], {"to": ir.DataType.FLOAT})
    real = tape.op("Mul", [cast, scale])
    for value, suffix in ((cast, "float"), (real, "real")):
        value.name = f"{integers.name}_{suffix}"
        value.shape, value.type = integers.shape, ir.TensorType(ir.DataType.FLOAT)
    for node in tape.nodes:
        node.name = node.outputs[0].name
    for use in uses:
        use.node.replace_input_with(use.idx, real)
    return list(tape.nodes)


def _dequantized_past(value: ir.Value | None) -> tuple[ir.Value, ir.Node] | None:
    """The int8 cache input that ``value`` is dequantized from, and the Mul that gives it; None if it is none."""
    mul = producer_of(value, "Mul")
    cast = None if mul is None else producer_of(mul.inputs[0], "Cast")
    past = None if cast is None else cast.inputs[0]
    if mul is None or past is None or not past.is_graph_input() or not (past.name or "").startswith(PAST_NAME):
        return None
    return past, mul


def _shape_of_scales(value: ir.Value) -> ir.Shape:
    """The shape of a cache tensor with one entry a token."""
    return ir.Shape([*_sizes(value)[:_ENTRIES], 1])


def _sizes(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise ValueError(f"{value.name!r} has no shape")
    return value.shape
