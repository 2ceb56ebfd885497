"""Scales fixed beforehand by calibration data.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 2.1; for ranges, see ``_ranges``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import HistogramObserver, Observer, statistic_of
from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization._ranges import QuantizationParameters, RangeMethod, parameters_of, range_not_ready
from planish.passes.quantization.activations.float_matmul import FloatMatMul
from planish.passes.quantization.activations.writer import GraphWriter


@dataclass(frozen=True)
class StaticActivations(FloatMatMul):
    """Activations pass a QuantizeLinear and a DequantizeLinear with constant scales."""

    statistics: ClassVar[tuple[type[Observer], ...]] = (HistogramObserver,)

    range: RangeMethod
    signed: bool

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why a scale cannot be fixed; None if it can."""
        return range_not_ready(site)

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """All entries in the fixed steps."""
        return self._parameters(site).dequantized(data)

    def operand(self, writer: GraphWriter, site: MatMulSite) -> ir.Value:
        """The activation in fixed steps, in float."""
        return writer.once(site.data, lambda: (self._quantize(writer, site),))[0]

    def _quantize(self, writer: GraphWriter, site: MatMulSite) -> ir.Value:
        data, parameters = site.data, self._parameters(site)
        scale = writer.constants.constant(f"{data.name}_scale", np.array(parameters.scale, np.float32))
        zero_point = np.array(parameters.zero_point, parameters.dtype)
        operands = [scale, writer.constants.constant(f"{data.name}_zero_point", zero_point)]
        add = functools.partial(writer.add, site.node, shape=data.shape)
        integers = add("steps", "QuantizeLinear", [data, *operands], dtype=ir.DataType.from_numpy(parameters.dtype))
        return add("real", "DequantizeLinear", [integers, *operands])

    def _parameters(self, site: MatMulSite) -> QuantizationParameters:
        histogram = statistic_of(site.data, HistogramObserver)
        if histogram is None:
            raise ValueError(f"no histogram of {site.data.name!r} was collected")
        return parameters_of(histogram, self.range, signed=self.signed)
