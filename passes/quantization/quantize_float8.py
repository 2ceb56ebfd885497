"""Multiply in 8-bit floating point (E4M3), scales fixed beforehand by calibration data.

Before:  r = MatMul (x, w)
After:   q = QuantizeLinear (x, t, zero);  e = DequantizeLinear (q, t, zero);  d = DequantizeLinear <axis=1> (w8, s)
         r = MatMul (e, d)                          w8: float8e4m3fn; s: one scale for each column, t: one for all of x

For targets whose tensor cores multiply such numbers: TensorRT makes one operator of this form. Micikevicius et al. 2022
("FP8 Formats for Deep Learning", section 4): a scale takes the largest magnitude to the largest number of the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import HistogramObserver, statistic_of
from planish.optimizer.interfaces.pass_base import StatisticRequest
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._ranges import range_unready

_FLOAT8 = ml_dtypes.float8_e4m3fn
_LARGEST = float(ir.DataType.FLOAT8E4M3FN.max)


@dataclass(frozen=True)
class QuantizeFloat8(QuantizationPass):
    """Quantize products with constant matrices; those that read the same activation share its quantization."""

    name: ClassVar[str] = "quantize-float8"

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """The range of each activation."""
        return [
            *super().statistics(model),
            *(StatisticRequest(site.data, HistogramObserver) for site in self.candidates(model)),
        ]

    def not_ready(self, site: MatMulSite) -> str | None:
        """Why a scale cannot be given."""
        return range_unready(site)

    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """The matrix as products will see it."""
        matrix = site.tensor.numpy()
        scale = _column_scales(matrix)
        return np.asarray(_float8(matrix, scale).astype(np.float32) * scale)

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """An activation as products will see it."""
        scale = _scale_of(site)
        return np.asarray(_float8(data, scale).astype(np.float32) * scale)

    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Write the 8-bit form of each product; what one graph makes another does not read."""
        made: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
        for site in sites:
            graph, data, weight = site.node.graph, site.data, site.weight
            if not isinstance(graph, ir.Graph):
                continue
            for value, write in ((weight, _stored), (data, _rounded_data)):
                if (graph, value) not in made:
                    made[graph, value] = write(model.graph, site)
            site.node.replace_input_with(1, made[graph, weight])
            site.node.replace_input_with(0, made[graph, data])


def _float8(data: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    return np.asarray(np.clip(data / scale, -_LARGEST, _LARGEST).astype(_FLOAT8))


def _column_scales(matrix: np.ndarray) -> np.ndarray:
    scale = np.abs(matrix).max(axis=0) / np.float32(_LARGEST)
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def _scale_of(site: MatMulSite) -> np.float32:
    found = statistic_of(site.data, HistogramObserver)
    reach = 0.0 if found is None else max(-found.low, found.high)
    return np.float32(f"{reach / _LARGEST:.4g}") if reach > 0 else np.float32(1)


def _stored(graph: ir.Graph, site: MatMulSite) -> ir.Value:
    """The matrix in 8 bits, made real again column by column."""
    tensor, name = site.tensor, site.weight.name or ""
    scale = _column_scales(tensor.numpy())
    kind, shape = ir.DataType.FLOAT8E4M3FN, sizes_of(tensor)
    matrix = add_initializer(
        graph, f"{name}_float8", lazy(lambda: _float8(tensor.numpy(), scale), kind, shape, f"{name}_float8")
    )
    return _real(site, [matrix, add_initializer(graph, f"{name}_scale", scale)], site.weight, {"axis": 1})


def _rounded_data(graph: ir.Graph, site: MatMulSite) -> ir.Value:
    """The activation in 8 bits, made real again."""
    name = site.data.name or ""
    scale = add_initializer(graph, f"{name}_scale", np.array(_scale_of(site), np.float32))
    zero = ir.tensor(np.zeros((), _FLOAT8), dtype=ir.DataType.FLOAT8E4M3FN, name=f"{name}_zero_point")
    operands = [scale, add_initializer(graph, f"{name}_zero_point", zero)]
    node = _placed(site, ir.node("QuantizeLinear", [site.data, *operands], name=f"{name}_QuantizeLinear"))
    steps = node.outputs[0]
    steps.name, steps.shape, steps.type = f"{name}_float8", site.data.shape, ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    return _real(site, [steps, *operands], site.data, {})


def _real(site: MatMulSite, operands: Sequence[ir.Value], like: ir.Value, attributes: dict[str, int]) -> ir.Value:
    node = ir.node("DequantizeLinear", operands, attributes, name=f"{like.name}_DequantizeLinear")
    value = _placed(site, node).outputs[0]
    value.name, value.shape, value.type = f"{like.name}_real", like.shape, ir.TensorType(ir.DataType.FLOAT)
    return value


def _placed(site: MatMulSite, node: ir.Node) -> ir.Node:
    copy_location(site.node, node)
    if site.node.graph is not None:
        site.node.graph.insert_before(site.node, node)
    return node
