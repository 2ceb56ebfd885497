"""MatMul of dequantized operands, which a runtime fuses into a MatMul of integers."""

from __future__ import annotations

import abc

import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization.activations.activation_mode import ActivationMode
from planish.passes.quantization.activations.writer import GraphWriter


class FloatMatMul(ActivationMode):
    """A mode that keeps the MatMul and puts a DequantizeLinear behind its matrix."""

    @abc.abstractmethod
    def operand(self, writer: GraphWriter, site: MatMulSite) -> ir.Value:
        """The activation as the MatMul reads it."""

    def rewrite(self, writer: GraphWriter, site: MatMulSite) -> None:
        """Write r = MatMul (operand, DequantizeLinear (w8, s))."""
        node = site.node
        weight = list(writer.constants.weight(site))
        real = writer.add(node, "weight", "DequantizeLinear", weight, {"axis": 1}, shape=site.weight.shape)
        node.replace_input_with(0, self.operand(writer, site))
        node.replace_input_with(1, real)
