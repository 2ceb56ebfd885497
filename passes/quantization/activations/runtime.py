"""Scales left to the runtime, which reads a float activation and a matrix stored in int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization.activations.activation_mode import symmetric_steps
from planish.passes.quantization.activations.float_matmul import FloatMatMul
from planish.passes.quantization.activations.writer import GraphWriter


class RuntimeActivations(FloatMatMul):
    """Activations stay in float in the graph."""

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """Each row in steps of its own: an assumption, the runtime may choose other groups of entries, or none."""
        return symmetric_steps(data, axis=-1)

    def operand(self, writer: GraphWriter, site: MatMulSite) -> ir.Value:
        """The activation itself."""
        return site.data
