"""MatMul of integers: MatMulInteger of a quantized activation and an int8 matrix, scaled afterwards."""

from __future__ import annotations

import abc

import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.optimizer.ir.edit import replace_value
from planish.passes.quantization.activations.activation_mode import ActivationMode
from planish.passes.quantization.activations.writer import GraphWriter


class IntegerMatMul(ActivationMode):
    """A mode whose scales are computed by the engine."""

    @abc.abstractmethod
    def quantize(self, writer: GraphWriter, before: ir.Node, activation: ir.Value) -> tuple[ir.Value, ...]:
        """An activation in uint8, its zero point, and the factor of the rows of the result."""

    def column_factor(self, writer: GraphWriter, scale: ir.Value) -> ir.Value:
        """The factor of each column of the results; ``scale`` has the scales of the matrix."""
        return scale

    def rewrite(self, writer: GraphWriter, site: MatMulSite) -> None:
        """Write r = (q · w8) · column factor · row factor."""
        node, data, shape = site.node, site.data, site.node.outputs[0].shape
        weight, scale = writer.constants.weight(site)
        integers, zero_point, factor = writer.once(data, lambda: self.quantize(writer, node, data))
        operands = [integers, weight, zero_point]
        sums = writer.add(node, "int32", "MatMulInteger", operands, shape=shape, dtype=ir.DataType.INT32)
        real = writer.add(node, "float", "Cast", [sums], {"to": ir.DataType.FLOAT}, shape=shape)
        # Columns before rows: `legalize-onnxruntime` fuses MatMulInteger, the Cast and the column factor.
        # It leaves row factors apart, since MatMulIntegerToFloat is wrong with a scale for each row and a bias.
        columns = writer.add(node, "columns", "Mul", [real, self.column_factor(writer, scale)], shape=shape)
        rows = writer.add(node, "rows", "Mul", [columns, factor], shape=shape)
        # A later MatMul that reads this result must still find its statistics: they move to the new value.
        replace_value(node.outputs[0], rows, "float")
        writer.graph.remove(node, safe=True)
