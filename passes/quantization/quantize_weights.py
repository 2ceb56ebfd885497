"""Store weights in 8 or 4 bits, in blocks; activations stay as they are.

Before:  r = MatMul (x, w)
After:   d = DequantizeLinear <axis=0, block_size=32> (w4, s);  r = MatMul (x, d)           s: [rows / 32, columns]

What the ONNX standard calls blocked quantization (DequantizeLinear, opset 21); a target makes one operator of both. A
step of a decoder reads every weight once and computes little: it is as fast as the weights are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from pydantic import AfterValidator

from planish.optimizer.interfaces.observers import Observer
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass, one_of
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._blocks import BlockFormat
from planish.passes.quantization.methods import METHODS
from planish.passes.quantization.methods.weight_method import WeightMethod

_TYPES = {
    (4, True): (ir.DataType.INT4, ml_dtypes.int4),
    (4, False): (ir.DataType.UINT4, ml_dtypes.uint4),
    (8, True): (ir.DataType.INT8, np.int8),
    (8, False): (ir.DataType.UINT8, np.uint8),
}


@dataclass(frozen=True)
class QuantizeWeights(QuantizationPass):
    """Quantize the constant matrices of MatMuls, each block of a column with a scale of its own."""

    name: ClassVar[str] = "quantize-weights"

    bits: Annotated[int, AfterValidator(one_of(4, 8))] = 8
    """Bits of an entry."""

    block: Annotated[int, AfterValidator(one_of(16, 32, 64, 128, 256))] = 32
    """Entries of a column that share a scale; the rows of a matrix must be a multiple of it."""

    symmetric: bool = True
    """Keep ranges symmetric around zero; else each block has a zero point as well."""

    method: Literal["nearest", "mse", "hqq", "gptq"] = "mse"
    """Choice of scales: `nearest` keeps the whole range, `mse` the share of it with the least error, `hqq` (with
    zero points) weighs large errors less. `gptq` takes those of `mse`, and chooses integers that keep the products
    with calibration data instead of the matrix itself."""

    @property
    def weight_method(self) -> WeightMethod:
        """The method that the option ``method`` names."""
        return METHODS[self.method](BlockFormat(self.bits, self.block, self.symmetric))

    @property
    def site_statistics(self) -> Sequence[type[Observer]]:
        """Statistics that the method needs."""
        return self.weight_method.statistics

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why the method cannot be used."""
        return self.weight_method.not_ready(site)

    def consume(self, model: ir.Model) -> None:
        """Quantize each matrix whose statistics are there."""
        for site in self.candidates(model) if self.weight_method.statistics else ():
            if self.weight_method.not_ready(site) is None:
                self.weight_method.blocks(site)

    def unsupported(self, site: MatMulSite) -> str | None:
        """Reason why a matrix cannot be cut into blocks."""
        rows = sizes_of(site.tensor)[0]
        return f"its {rows} rows are no multiple of a block of {self.block}" if rows % self.block else None

    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Replace each matrix by its integers, once for all that read it, and a DequantizeLinear in each graph."""
        # Integers are shared by tensor and lie in the main graph; a DequantizeLinear in one branch cannot be read in
        # the other.
        stored: dict[int, list[ir.Value]] = {}
        dequantized: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
        for site in sites:
            graph, weight, tensor = site.node.graph, site.weight, site.tensor
            if not isinstance(graph, ir.Graph):
                continue
            if id(tensor) not in stored:
                stored[id(tensor)] = self._store(model.graph, site)
            if (graph, weight) not in dequantized:
                dequantized[graph, weight] = self._dequantize(graph, site, stored[id(tensor)])
            site.node.replace_input_with(1, dequantized[graph, weight])

    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """Values that the integers of a matrix stand for."""
        return self.weight_method.blocks(site).dequantized(site.tensor.numpy())

    def _store(self, graph: ir.Graph, site: MatMulSite) -> list[ir.Value]:
        """Constants: integers, scales and, if there are any, zero points."""
        tensor, name = site.tensor, site.weight.name or ""
        blocks = self.weight_method.blocks(site)
        dtype, numpy_type = _TYPES[self.bits, self.symmetric]
        # Lazy: all matrices of a model in integers would be in memory at once, before the first of them is written.
        read = lambda: blocks.integers(tensor.numpy()).astype(numpy_type)  # noqa: E731
        integers = add_initializer(graph, f"{name}_q", lazy(read, dtype, sizes_of(tensor), f"{name}_q"))
        constants = [integers, add_initializer(graph, f"{name}_scale", blocks.scale)]
        if blocks.zero_point is not None:
            zero_point = ir.tensor(blocks.zero_point.astype(numpy_type), dtype=dtype, name=f"{name}_zero_point")
            constants.append(add_initializer(graph, f"{name}_zero_point", zero_point))
        return constants

    def _dequantize(self, graph: ir.Graph, site: MatMulSite, constants: Sequence[ir.Value]) -> ir.Value:
        """The matrix in float, in front of the first MatMul of a graph that reads it."""
        name = site.weight.name or ""
        attributes = {"axis": 0, "block_size": self.block}
        node = ir.node("DequantizeLinear", constants, attributes, name=f"{name}_DequantizeLinear")
        copy_location(site.node, node)
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{name}_real", site.weight.shape, site.weight.type
        graph.insert_before(site.node, node)
        return output
