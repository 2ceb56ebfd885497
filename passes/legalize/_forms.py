"""Tuning graphs for the forms of a target: an operator with its usual surroundings in a Transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import onnx.parser
import onnx.shape_inference
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import TuningQuery
from planish.optimizer.ir.program import size_of

_HEADER = '<ir_version: 10, opset_import: ["" : 23]>'


def ask_about_attention(graph: ir.Graph, sizes: Mapping[str, int]) -> Iterator[TuningQuery]:
    """Query whether the standard's operator or MultiHeadAttention is faster, for attention without a cache.

    The sizes are those of the first attention of rank four with equal query and key heads.
    """
    for node in graph:
        if node.op_type != "Attention" or node.domain != "" or len(node.outputs) != 1 or len(node.inputs) > 4:
            continue
        query, key = (_sizes(value, sizes) for value in node.inputs[:2])
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if len(query) != 4 or len(key) != 4 or query[1] != key[1] or not _produced(node.inputs[1]):
            continue
        (batch, heads, queries, size), keys = query, key[2]
        kind = "" if mask is None else "bool" if mask.dtype == ir.DataType.BOOL else "float"
        given = f", {kind}[{batch},1,{queries},{keys}] m" if kind else ""
        # The text is the key of the tuning table: it must name all that the latency depends on.
        about = f"batch={batch} heads={heads} queries={queries} keys={keys} size={size} mask={kind or 'none'}"
        make = partial(_attention, batch, heads, queries, keys, size, given)
        yield TuningQuery("attention", ("standard", "multi-head"), about, make)
        return


def ask_about_sums(graph: ir.Graph, sizes: Mapping[str, int]) -> Iterator[TuningQuery]:
    """Query whether the runtime's fusion of an addition with a LayerNormalization is faster."""
    for node in graph:
        if node.op_type != "LayerNormalization" or node.domain != "" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        dims = _sizes(node.inputs[0], sizes)
        if add is not None and add.op_type == "Add" and len(dims) == 3:
            about = f"batch={dims[0]} tokens={dims[1]} width={dims[2]}"
            yield TuningQuery("keep_sums", (True, False), about, partial(_sum, *dims))
            return


def _sizes(value: ir.Value | None, sizes: Mapping[str, int]) -> list[int]:
    """All sizes of a value; empty if one is unknown."""
    dims = [] if value is None or value.shape is None else [size_of(dim, sizes) for dim in value.shape]
    sizes_found = [size for size in dims if size is not None]
    return sizes_found if len(sizes_found) == len(dims) else []


def _produced(key: ir.Value | None) -> bool:
    """True if keys are computed in this graph, without a cache."""
    node = None if key is None else key.producer()
    return node is not None and node.op_type == "Transpose"


def _attention(batch: int, heads: int, queries: int, keys: int, size: int, mask: str) -> ir.Model:
    """Attention between the reshapes and transpositions that split and merge heads."""
    width = heads * size
    kind = {"q": queries, "k": keys, "v": keys}
    inputs = ", ".join(f"float[{batch},{length},{width}] {name}" for name, length in kind.items())
    lines = [f"{n}s = Reshape ({n}, split) {n}h = Transpose <perm=[0,2,1,3]> ({n}s)" for n in kind]
    return _parsed(
        f"""g ({inputs}{mask}) => (float[{batch},{queries},{width}] r)
        <int64[4] split = {{0, 0, {heads}, {size}}}, int64[3] join = {{0, 0, {width}}}> {{
        {" ".join(lines)}
        o = Attention (qh, kh, vh{", m" if mask else ""})
        t = Transpose <perm=[0,2,1,3]> (o)
        r = Reshape (t, join)
        }}"""
    )


def _sum(batch: int, tokens: int, width: int) -> ir.Model:
    """An addition whose result is normalized, and added to the normalized value."""
    kind = f"float[{batch},{tokens},{width}]"
    return _parsed(
        f"""g ({kind} x, {kind} y, float[{width}] scale, float[{width}] bias) => ({kind} r) {{
        h = Add (x, y)
        n = LayerNormalization (h, scale, bias)
        r = Add (h, n)
        }}"""
    )


def _parsed(text: str) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(_HEADER + text)))
    return model
