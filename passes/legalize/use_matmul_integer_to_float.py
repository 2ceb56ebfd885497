"""Multiply integers with ONNX Runtime's own operator, which adds the bias as well.

Before:  e = DequantizeLinear (q, t, z);  d = DequantizeLinear <axis=1> (w8, s);  p = MatMul (e, d);  r = Add (p, b)
After:   r = com.microsoft.MatMulIntegerToFloat (q, w8, t, s, z, , b)                                      q: uint8

The runtime fuses the product by itself, but then adds the bias apart, or fuses it into a slower Gelu. Activations of
type int8 stay: their kernel is slower than that of floats on x86.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.interfaces.quantization_pass import products_of
from planish.optimizer.ir.edit import remove_dead, replace_value
from planish.optimizer.ir.graph import location_of, rank_of, sizes_of, sole_user, vector_operand

_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class UseMatMulIntegerToFloat(Pass):
    """Replace each MatMul of a statically quantized uint8 activation and an int8 matrix by one operator with its
    bias."""

    name: ClassVar[str] = "use-matmul-integer-to-float"
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph and its subgraphs."""
        result = PassResult(model, modified=False)
        for node in products_of(model):
            data, weight = (None if value is None else value.producer() for value in node.inputs)
            if data is None or weight is None or {data.op_type, weight.op_type} != {"DequantizeLinear"}:
                continue
            reason = _obstacle(data, weight)
            if reason is not None:
                result.refusals.append(Refusal.at(node, reason, node.inputs[0]))
            elif admitted():
                result.sites.append(location_of(node))
                _rewrite(node, data, weight)
        result.modified = bool(result.sites)
        if result.modified:
            model.opset_imports.setdefault(_CONTRIB, 1)
        return result


def _obstacle(data: ir.Node, weight: ir.Node) -> str | None:
    """The reason why the operator cannot express two DequantizeLinears and a MatMul."""
    steps, scale = data.inputs[0], data.inputs[1]
    # The kernel for int8 activations is slower than float on x86.
    if steps is None or steps.dtype is not ir.DataType.UINT8:
        return "its activation is not of type uint8"
    if rank_of(scale) != 0 or len(data.inputs) < 3 or data.inputs[2] is None:
        return "its activation has no single scale and zero point"
    matrix, scales = weight.inputs[0], weight.inputs[1]
    if matrix is None or matrix.dtype is not ir.DataType.INT8 or rank_of(matrix) != 2 or matrix.const_value is None:
        return "its weights are no constant matrix of type int8"
    per_column = rank_of(scales) == 1 and weight.attributes.get_int("axis", 1) == 1 and len(weight.inputs) == 2
    return None if per_column else "its weights have no scale for each column"


def _columns(weight: ir.Node) -> int:
    matrix = weight.inputs[0]
    return 0 if matrix is None or matrix.const_value is None else sizes_of(matrix.const_value)[1]


def _rewrite(node: ir.Node, data: ir.Node, weight: ir.Node) -> None:
    graph, add = node.graph, sole_user(node.outputs[0])
    if graph is None:
        raise ValueError(f"{node.name!r} was removed")
    joined = add is not None and add.op_type == "Add" and add.domain == "" and add.graph is graph
    index = vector_operand(add, _columns(weight)) if add is not None and joined else None
    last = node if add is None or index is None else add
    bias = None if add is None or index is None else add.inputs[index]
    fused = ir.node(
        "MatMulIntegerToFloat",
        [data.inputs[0], weight.inputs[0], data.inputs[1], weight.inputs[1], data.inputs[2], None, bias],
        domain=_CONTRIB,
        name=f"{node.name}_integer",
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, fused)
    replace_value(last.outputs[0], fused.outputs[0], "real")
    if last is not node:
        graph.remove(last, safe=True)
    graph.remove(node, safe=True)
    # Other MatMuls may still read the dequantized activation.
    for real in (data, weight):
        remove_dead(real.graph or graph, real)
