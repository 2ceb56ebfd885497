"""Store weights in 8 or 4 bits, in blocks; activations stay as they are.

Before:  r = MatMul (x, w)
After:   d = DequantizeLinear <axis=0, block_size=32> (w4, s);  r = MatMul (x, d)           s: [rows / 32, columns]

What the ONNX standard calls blocked quantization (DequantizeLinear, opset 21); a target makes one operator of both. A
step of a decoder reads every weight once and computes little: it is as fast as the weights are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from pydantic import AfterValidator

from planish.optimizer.interfaces.observers import GramObserver
from planish.optimizer.interfaces.pass_base import StatisticRequest
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass, one_of
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._gptq import AnyMethod, Rounding

_TYPES = {
    (4, True): (ir.DataType.INT4, ml_dtypes.int4),
    (4, False): (ir.DataType.UINT4, ml_dtypes.uint4),
    (8, True): (ir.DataType.INT8, np.int8),
    (8, False): (ir.DataType.UINT8, np.uint8),
}


@dataclass(frozen=True)
class QuantizeWeights(QuantizationPass):
    """Quantize the constant matrices of products, each block of a column with a scale of its own."""

    name: ClassVar[str] = "quantize-weights"

    bits: Annotated[int, AfterValidator(one_of(4, 8))] = 8
    """Bits of an entry."""

    block: Annotated[int, AfterValidator(one_of(16, 32, 64, 128, 256))] = 32
    """Entries of a column that share a scale; the rows of a matrix must be a multiple of it."""

    symmetric: bool = True
    """Whether ranges are symmetric around zero; else each block has a zero point as well."""

    method: AnyMethod = "mse"
    """How scales are found: `nearest` keeps the whole range, `mse` the share of it with the least error, `hqq` (with
    zero points) weighs large errors less. `gptq` takes those of `mse`, and chooses integers that keep the products
    with calibration data instead of the matrix itself."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """What the error of a product depends on, for gptq."""
        sites = self.candidates(model) if self.method == "gptq" else []
        return [*super().statistics(model), *(StatisticRequest(site.data, GramObserver) for site in sites)]

    def not_ready(self, site: MatMulSite) -> str | None:
        """Why gptq cannot be done."""
        return self._rounding.not_ready(site)

    def consume(self, model: ir.Model) -> None:
        """Find integers by gptq as soon as what they need was seen."""
        for site in self.candidates(model) if self.method == "gptq" else ():
            self._rounding.consume(site)

    def unsupported(self, site: MatMulSite) -> str | None:
        """Why a matrix cannot be cut into blocks."""
        rows = sizes_of(site.tensor)[0]
        return f"its {rows} rows are no multiple of a block of {self.block}" if rows % self.block else None

    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Replace each matrix by its integers, once for all that read it, and a DequantizeLinear in each graph."""
        stored: dict[int, list[ir.Value]] = {}
        real: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
        for site in sites:
            graph, weight, tensor = site.node.graph, site.weight, site.tensor
            if not isinstance(graph, ir.Graph):
                continue
            if id(tensor) not in stored:
                stored[id(tensor)] = self._stored(model.graph, site)
            if (graph, weight) not in real:
                real[graph, weight] = self._real(graph, site, stored[id(tensor)])
            site.node.replace_input_with(1, real[graph, weight])

    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """The matrix as products will see it."""
        return self._rounding.blocks(site).restored(site.tensor.numpy())

    @property
    def _rounding(self) -> Rounding:
        return Rounding(self.bits, self.block, self.symmetric, self.method)

    def _stored(self, graph: ir.Graph, site: MatMulSite) -> list[ir.Value]:
        """Integers, scales and, if there are any, zero points."""
        tensor, name = site.tensor, site.weight.name or ""
        blocks = self._rounding.blocks(site)
        dtype, kind = _TYPES[self.bits, self.symmetric]
        stored = lazy(lambda: blocks.integers(tensor.numpy()).astype(kind), dtype, sizes_of(tensor), f"{name}_q")
        parts = [add_initializer(graph, f"{name}_q", stored), add_initializer(graph, f"{name}_scale", blocks.scale)]
        if blocks.zero_point is not None:
            zero = ir.tensor(blocks.zero_point.astype(kind), dtype=dtype, name=f"{name}_zero_point")
            parts.append(add_initializer(graph, f"{name}_zero_point", zero))
        return parts

    def _real(self, graph: ir.Graph, site: MatMulSite, parts: Sequence[ir.Value]) -> ir.Value:
        """The matrix made real again, in front of the first product of a graph that reads it."""
        name = site.weight.name or ""
        node = ir.node(
            "DequantizeLinear",
            parts,
            {"axis": 0, "block_size": self.block},
            name=f"{name}_DequantizeLinear",
        )
        copy_location(site.node, node)
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{name}_real", site.weight.shape, site.weight.type
        graph.insert_before(site.node, node)
        return output
