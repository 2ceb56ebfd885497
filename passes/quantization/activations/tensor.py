"""One scale and zero point for a whole activation, computed by the engine.

ONNX, operator DynamicQuantizeLinear. Fewer operators than a scale for each token, but coarser, and rows influence each
other.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization.activations.activation_mode import symmetric_steps
from planish.passes.quantization.activations.integer_matmul import IntegerMatMul
from planish.passes.quantization.activations.writer import GraphWriter


class TensorActivations(IntegerMatMul):
    """Activations are quantized by DynamicQuantizeLinear."""

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """All entries in the same symmetric steps: an approximation, the operator's range need not be symmetric."""
        return symmetric_steps(data, axis=None)

    def quantize(self, writer: GraphWriter, before: ir.Node, activation: ir.Value) -> tuple[ir.Value, ...]:
        """The activation in uint8, its zero point and its scale."""
        suffixes = ("uint8", "scale", "zero_point")
        integers, scale, zero_point = writer.insert(before, suffixes, "DynamicQuantizeLinear", [activation])
        integers.shape, integers.type = activation.shape, ir.TensorType(ir.DataType.UINT8)
        scale.shape, scale.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
        zero_point.shape, zero_point.type = ir.Shape([]), ir.TensorType(ir.DataType.UINT8)
        return integers, zero_point, scale
