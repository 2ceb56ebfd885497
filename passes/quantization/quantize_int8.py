"""Multiply in 8 bits: weights with a scale per column, activations per token, per tensor, by the runtime or fixed.

Before:  r = MatMul (x, w)
After:   (activations=token; w8 and s are w in int8 with one scale per column)
         a = ReduceMax (x, {-1});  b = ReduceMin (x, {-1});  t = Max (a, Neg (b), tiny);  u = Div (x, t)
         q = QuantizeLinear (u, 1/127, 128);  i = MatMulInteger (q, w8, 128);  f = Cast <to=1> (i)
         g = Mul (f, s/127);  r = Mul (g, t)

         (activations=runtime)
         d = DequantizeLinear <axis=1> (w8, s);  r = MatMul (x, d)

         (activations=static; t and z are fixed by calibration data)
         q = QuantizeLinear (x, t, z);  e = DequantizeLinear (q, t, z);  d = DequantizeLinear <axis=1> (w8, s)
         r = MatMul (e, d)

activations=tensor writes DynamicQuantizeLinear and MatMulInteger. All operators are of the ONNX standard. Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"; scales per token:
Yao et al. 2022, "ZeroQuant", section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import Observer
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass
from planish.optimizer.ir.graph import sizes_of
from planish.passes.quantization._blocks import BlockFormat, QuantizedBlocks
from planish.passes.quantization._ranges import RangeMethod
from planish.passes.quantization.activations.activation_mode import ActivationMode
from planish.passes.quantization.activations.runtime import RuntimeActivations
from planish.passes.quantization.activations.static import StaticActivations
from planish.passes.quantization.activations.tensor import TensorActivations
from planish.passes.quantization.activations.token import TokenActivations
from planish.passes.quantization.activations.writer import GraphWriter, SharedConstants
from planish.passes.quantization.methods import METHODS
from planish.passes.quantization.methods.weight_method import WeightMethod


@dataclass(frozen=True)
class QuantizeInt8(QuantizationPass):
    """Quantize MatMuls with a constant matrix of at least ``minimum`` elements; everything else stays in float.

    MatMuls that read the same activation share its quantization.
    """

    name: ClassVar[str] = "quantize-int8"

    activations: Literal["token", "tensor", "runtime", "static"] = "token"
    """Scales of activations: one per `token` (rows do not influence each other: a padded batch gives the same results
    as single rows), one per `tensor` (fewer operators, coarser, and rows do influence each other), left to the
    `runtime`, which reads float activations and stored int8 weights, or `static`: fixed by calibration data."""

    range: RangeMethod = "mse"
    """Range that static scales keep of the calibration data: all of it (`minmax`), the mean of the batches' extremes
    (`average`), 99.99 % (`percentile`), the closest distribution (`entropy`), or the least squared error (`mse`)."""

    signed: bool = False
    """Static scales are for int8 around zero; else for uint8 from the lowest to the highest entry."""

    reduced: bool = False
    """Give weights 7 bits: on x86 without VNNI two products of 8 bits overflow the 16 bits that they are added in."""

    method: Literal["nearest", "mse", "gptq"] = "nearest"
    """Rounding of a column: `nearest` keeps its whole range, `mse` the share with the least error; `gptq` chooses
    integers that keep the products with calibration data instead of the matrix itself."""

    @property
    def mode(self) -> ActivationMode:
        """The mode that the option ``activations`` names."""
        modes: dict[str, ActivationMode] = {
            "token": TokenActivations(),
            "tensor": TensorActivations(),
            "runtime": RuntimeActivations(),
            "static": StaticActivations(self.range, self.signed),
        }
        return modes[self.activations]

    def method_for(self, site: MatMulSite) -> WeightMethod:
        """The method that the option ``method`` names, with one block for each column of a matrix."""
        rows = sizes_of(site.tensor)[0]
        return METHODS[self.method](BlockFormat(7 if self.reduced else 8, rows, symmetric=True))

    def blocks_of(self, site: MatMulSite) -> QuantizedBlocks:
        """Integers and scales of the matrix of a site."""
        return self.method_for(site).blocks(site)

    @property
    def site_statistics(self) -> Sequence[type[Observer]]:
        """Statistics that the activation mode and the method need."""
        return (*self.mode.statistics, *METHODS[self.method].statistics)

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why a scale cannot be fixed, or the method cannot be used."""
        return self.mode.not_ready(site) or self.method_for(site).not_ready(site)

    def consume(self, model: ir.Model) -> None:
        """Quantize each matrix whose statistics are there."""
        for site in self.candidates(model) if METHODS[self.method].statistics else ():
            if self.method_for(site).not_ready(site) is None:
                self.blocks_of(site)

    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Write the 8-bit form of each MatMul."""
        constants = SharedConstants(model.graph, self.blocks_of)
        writers: dict[ir.Graph, GraphWriter] = {}
        for site in sites:
            # A writer for each graph: the quantized activation of one branch cannot be read in the other.
            graph = site.node.graph
            if isinstance(graph, ir.Graph):
                self.mode.rewrite(writers.setdefault(graph, GraphWriter(graph, constants)), site)

    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """Values that the integers of a matrix stand for."""
        return self.blocks_of(site).dequantized(site.tensor.numpy())

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """Values of an activation in the steps of its mode."""
        return self.mode.dequantized_input(site, data)
