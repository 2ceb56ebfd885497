"""Multiply by matrices in blocks with ONNX Runtime's own operator.

Before:  d = DequantizeLinear <axis=0, block_size=32> (w4, s);  r = MatMul (x, d)           w4: int4, [rows, columns]
After:   r = com.microsoft.MatMulNBits <K=rows, N=columns, bits=4, block_size=32> (x, packed, s)

Activations are rounded to int8, in blocks of the same size, unless they are kept in float, which is slower by far.
Layout: documentation of com.microsoft.MatMulNBits in ONNX Runtime's ContribOperators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.interfaces.quantization_pass import products_of
from planish.optimizer.ir.edit import add_initializer, remove_dead, replace_value
from planish.optimizer.ir.graph import location_of, sizes_of
from planish.optimizer.ir.lazy_tensors import lazy

_CONTRIB = "com.microsoft"
_BITS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
_SIGNED = (ir.DataType.INT4, ir.DataType.INT8)
_ACCURACY = {"int8": 4, "float": 0}
"""Values of the operator's attribute accuracy_level."""


@dataclass(frozen=True)
class UseMatMulNBits(Pass):
    """Replace each MatMul with a block-wise quantized matrix in 4 or 8 bits by MatMulNBits."""

    name: ClassVar[str] = "use-matmul-nbits"
    exact: ClassVar[bool] = False

    activations: Literal["int8", "float"] = "int8"
    """Type of the kernel's arithmetic; its fast paths require int8."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph and its subgraphs."""
        result = PassResult(model, modified=False)
        packed: dict[ir.Value, list[ir.Value]] = {}
        for node in products_of(model):
            real = None if node.inputs[1] is None else node.inputs[1].producer()
            if real is None or real.op_type != "DequantizeLinear" or "block_size" not in real.attributes:
                continue
            reason = _obstacle(real)
            if reason is not None:
                result.refusals.append(Refusal.at(node, reason, real))
            elif admitted():
                result.sites.append(location_of(node))
                stored = real.inputs[0]
                # A tied matrix is packed once for all its readers.
                if stored is not None and stored not in packed:
                    packed[stored] = _packed(model.graph, real)
                self._replace(node, real, [] if stored is None else packed[stored])
        result.modified = bool(result.sites)
        if result.modified:
            model.opset_imports.setdefault(_CONTRIB, 1)
        return result

    def _replace(self, node: ir.Node, real: ir.Node, operands: list[ir.Value]) -> None:
        graph, (rows, columns) = node.graph, _sizes(real)
        if graph is None:
            raise ValueError(f"{node.name!r} was removed")
        attributes = {
            "K": rows,
            "N": columns,
            "bits": _BITS[_dtype(real)],
            "block_size": real.attributes["block_size"].as_int(),
            "accuracy_level": _ACCURACY[self.activations],
        }
        fused = ir.node(
            "MatMulNBits",
            [node.inputs[0], *operands],
            attributes,
            domain=_CONTRIB,
            name=f"{node.name}_nbits",
            metadata_props=dict(node.metadata_props),
        )
        graph.insert_before(node, fused)
        replace_value(node.outputs[0], fused.outputs[0], "real")
        graph.remove(node, safe=True)
        remove_dead(real.graph or graph, real)


def _obstacle(real: ir.Node) -> str | None:
    """The reason why the operator cannot express a DequantizeLinear."""
    stored, axis = real.inputs[0], real.attributes.get("axis")
    if stored is None or stored.const_value is None or stored.const_value.dtype not in _BITS:
        return "its integers are no constant of 4 or 8 bits"
    if len(sizes_of(stored.const_value)) != 2 or axis is None or axis.as_int() != 0:
        return "its blocks do not run along the rows of a matrix"
    if any(value is None or value.const_value is None for value in real.inputs[1:]):
        return "its scales are not constant"
    return None


def _dtype(real: ir.Node) -> ir.DataType:
    stored = real.inputs[0]
    if stored is None or stored.dtype is None:
        raise ValueError(f"{real.name!r} was not checked")
    return stored.dtype


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    if value is None or value.const_value is None:
        raise ValueError("this operand was not checked")
    return value.const_value


def _sizes(real: ir.Node) -> tuple[int, int]:
    rows, columns = sizes_of(_tensor(real.inputs[0]))
    return rows, columns


def _packed(graph: ir.Graph, real: ir.Node) -> list[ir.Value]:
    """Integers, scales and optional zero points in the operator's layout: columns first."""
    stored, (rows, columns) = _tensor(real.inputs[0]), _sizes(real)
    bits, block, signed = _BITS[stored.dtype], real.attributes["block_size"].as_int(), stored.dtype in _SIGNED
    name, shape = (real.inputs[0].name if real.inputs[0] else "") or "", [columns, rows // block, block * bits // 8]
    packed = lazy(
        lambda: _pack(stored.numpy(), bits, signed).reshape(shape), ir.DataType.UINT8, shape, f"{name}_packed"
    )
    scale = _tensor(real.inputs[1])
    scales = lazy(
        lambda: np.ascontiguousarray(scale.numpy().T).reshape(-1), scale.dtype, [scale.size], f"{name}_scales"
    )
    operands = [add_initializer(graph, f"{name}_packed", packed), add_initializer(graph, f"{name}_scales", scales)]
    if len(real.inputs) > 2 and real.inputs[2] is not None:
        zero = _pack(_tensor(real.inputs[2]).numpy(), bits, signed).reshape(-1)
        operands.append(add_initializer(graph, f"{name}_zeros", zero))
    return operands


def _pack(integers: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Columns of (rows, columns) as unsigned bytes; of two 4-bit entries the earlier one is the lower half."""
    shifted = (integers.astype(np.int16) + (1 << (bits - 1) if signed else 0)).astype(np.uint8).T
    if bits == 8:
        return np.ascontiguousarray(shifted)
    even = np.pad(shifted, ((0, 0), (0, shifted.shape[1] % 2)))
    return np.asarray(even[:, ::2] | (even[:, 1::2] << 4), np.uint8)
