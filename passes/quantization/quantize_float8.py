"""Multiply in 8-bit floating point (E4M3), with scales fixed by calibration data.

Before:  r = MatMul (x, w)
After:   q = QuantizeLinear (x, t, zero);  e = DequantizeLinear (q, t, zero);  d = DequantizeLinear <axis=1> (w8, s)
         r = MatMul (e, d)                          w8: float8e4m3fn; s: one scale for each column, t: one for all of x

For targets whose tensor cores multiply such numbers: TensorRT fuses this form into one operator. Micikevicius et al.
2022, "FP8 Formats for Deep Learning", section 4: a scale maps the largest magnitude to the largest number of the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import HistogramObserver, Observer, statistic_of
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._ranges import range_not_ready

_FLOAT8 = ml_dtypes.float8_e4m3fn
_LARGEST = float(ir.DataType.FLOAT8E4M3FN.max)


@dataclass(frozen=True)
class QuantizeFloat8(QuantizationPass):
    """Quantize MatMuls with constant matrices; those that read the same activation share its quantization."""

    name: ClassVar[str] = "quantize-float8"

    @property
    def site_statistics(self) -> Sequence[type[Observer]]:
        """The range of each activation."""
        return (HistogramObserver,)

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why the scale of an activation cannot be fixed; None if it can."""
        return range_not_ready(site)

    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """The matrix, rounded to 8 bits."""
        matrix = site.tensor.numpy()
        scale = _column_scales(matrix)
        return np.asarray(_float8(matrix, scale).astype(np.float32) * scale)

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """An activation, rounded to 8 bits."""
        scale = _input_scale(site)
        return np.asarray(_float8(data, scale).astype(np.float32) * scale)

    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Write the 8-bit form of each MatMul."""
        # By graph: a value of one branch cannot be read in the other.
        quantized: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
        for site in sites:
            graph, data, weight = site.node.graph, site.data, site.weight
            if not isinstance(graph, ir.Graph):
                continue
            for value, quantize in ((weight, _quantize_weight), (data, _quantize_input)):
                if (graph, value) not in quantized:
                    quantized[graph, value] = quantize(model.graph, site)
            site.node.replace_input_with(1, quantized[graph, weight])
            site.node.replace_input_with(0, quantized[graph, data])


def _float8(data: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    # E4M3 has no infinity: what exceeds the range would become NaN, so it is clipped before.
    return np.asarray(np.clip(data / scale, -_LARGEST, _LARGEST).astype(_FLOAT8))


def _column_scales(matrix: np.ndarray) -> np.ndarray:
    scale = np.abs(matrix).max(axis=0) / np.float32(_LARGEST)
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def _input_scale(site: MatMulSite) -> np.float32:
    histogram = statistic_of(site.data, HistogramObserver)
    largest = 0.0 if histogram is None else max(-histogram.low, histogram.high)
    # Four digits, as for fixed scales of integers: differences in the last bits then hardly change the engine.
    return np.float32(f"{largest / _LARGEST:.4g}") if largest > 0 else np.float32(1)


def _quantize_weight(graph: ir.Graph, site: MatMulSite) -> ir.Value:
    """The matrix in 8 bits, dequantized column by column."""
    tensor, name = site.tensor, site.weight.name or ""
    scale = _column_scales(tensor.numpy())
    dtype, shape = ir.DataType.FLOAT8E4M3FN, sizes_of(tensor)
    matrix = add_initializer(
        graph, f"{name}_float8", lazy(lambda: _float8(tensor.numpy(), scale), dtype, shape, f"{name}_float8")
    )
    return _dequantize(site, [matrix, add_initializer(graph, f"{name}_scale", scale)], site.weight, {"axis": 1})


def _quantize_input(graph: ir.Graph, site: MatMulSite) -> ir.Value:
    """The activation in 8 bits, dequantized."""
    name = site.data.name or ""
    scale = add_initializer(graph, f"{name}_scale", np.array(_input_scale(site), np.float32))
    # The type of the zero point is the type of the result: without it, the operator would give uint8.
    zero_point = ir.tensor(np.zeros((), _FLOAT8), dtype=ir.DataType.FLOAT8E4M3FN, name=f"{name}_zero_point")
    operands = [scale, add_initializer(graph, f"{name}_zero_point", zero_point)]
    node = _insert(site, ir.node("QuantizeLinear", [site.data, *operands], name=f"{name}_QuantizeLinear"))
    float8 = node.outputs[0]
    float8.name, float8.shape, float8.type = f"{name}_float8", site.data.shape, ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    return _dequantize(site, [float8, *operands], site.data, {})


def _dequantize(
    site: MatMulSite, operands: Sequence[ir.Value], original: ir.Value, attributes: dict[str, int]
) -> ir.Value:
    node = ir.node("DequantizeLinear", operands, attributes, name=f"{original.name}_DequantizeLinear")
    value = _insert(site, node).outputs[0]
    value.name, value.shape, value.type = f"{original.name}_real", original.shape, ir.TensorType(ir.DataType.FLOAT)
    return value


def _insert(site: MatMulSite, node: ir.Node) -> ir.Node:
    copy_location(site.node, node)
    if site.node.graph is not None:
        site.node.graph.insert_before(site.node, node)
    return node
