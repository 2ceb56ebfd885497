"""One scale for each token, computed by the engine.

Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
section 4.1. Rows do not influence each other: a padded batch gives the same results as single rows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization.activations.activation_mode import LEVELS, SMALLEST_SCALE, symmetric_steps
from planish.passes.quantization.activations.integer_matmul import IntegerMatMul
from planish.passes.quantization.activations.writer import GraphWriter

_ZERO_POINT = 128
"""uint8, though the range is symmetric: the integer kernels of x86 multiply unsigned activations by signed weights."""


class TokenActivations(IntegerMatMul):
    """Rows are divided by their largest magnitude and quantized with the same step."""

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """Each row in steps of its own."""
        return symmetric_steps(data, axis=-1)

    def quantize(self, writer: GraphWriter, before: ir.Node, activation: ir.Value) -> tuple[ir.Value, ...]:
        """Rows in uint8, 128, and the largest magnitude of each row."""
        constant, add = writer.constants.constant, writer.add
        zero_point = constant("int8_zero_point", np.array(_ZERO_POINT, np.uint8))
        axes = constant("int8_axes", np.array([-1], np.int64))
        tiny = constant("int8_tiny", np.array(SMALLEST_SCALE, np.float32))
        step = constant("int8_step", np.array(1 / LEVELS, np.float32))
        whole = activation.shape
        row = None if whole is None else ir.Shape([*whole[:-1], 1])
        largest = add(before, "largest", "ReduceMax", [activation, axes], {"keepdims": 1}, shape=row)
        smallest = add(before, "smallest", "ReduceMin", [activation, axes], {"keepdims": 1}, shape=row)
        # Two reductions cost less than one of |x|, which would be written to memory in full.
        lowest = add(before, "lowest", "Neg", [smallest], shape=row)
        size = add(before, "size", "Max", [largest, lowest, tiny], shape=row)
        unit = add(before, "unit", "Div", [activation, size], shape=whole)
        operands = [unit, step, zero_point]
        integers = add(before, "uint8", "QuantizeLinear", operands, shape=whole, dtype=ir.DataType.UINT8)
        return integers, zero_point, size

    def column_factor(self, writer: GraphWriter, scale: ir.Value) -> ir.Value:
        """Scales of the matrix times the step of rows in [-1, 1]."""
        if scale.const_value is None:
            return scale
        return writer.constants.constant(f"{scale.name}_of_row", scale.const_value.numpy() / np.float32(LEVELS))
