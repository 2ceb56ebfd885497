"""Multiply in 8 bits: weights per channel, activations as they come.

Before:  r = MatMul (x, w)
After:   (activations=token; w8 and s are w in int8 with one scale per column)
         a = ReduceMax (x, {-1});  b = ReduceMin (x, {-1});  t = Max (a, Neg (b), tiny);  u = Div (x, t)
         q = QuantizeLinear (u, 1/127, 128);  i = MatMulInteger (q, w8, 128);  f = Cast <to=1> (i)
         g = Mul (f, s/127);  r = Mul (g, t)

         (activations=runtime)
         d = DequantizeLinear <axis=1> (w8, s);  r = MatMul (x, d)

         (activations=static; t and z from what was seen of x over calibration data)
         q = QuantizeLinear (x, t, z);  e = DequantizeLinear (q, t, z);  d = DequantizeLinear <axis=1> (w8, s)
         r = MatMul (e, d)

Everything written is of the ONNX standard. Jacob et al. 2018, "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference"; scales per token as in Yao et al. 2022, "ZeroQuant", section 4.1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import GramObserver, HistogramObserver, Observer, statistic_of
from planish.optimizer.interfaces.pass_base import StatisticRequest
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass
from planish.optimizer.ir.edit import add_initializer, copy_location, replace_value
from planish.optimizer.ir.graph import constant_of, sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._gptq import Rounding
from planish.passes.quantization._ranges import RangeMethod, Steps, range_unready, steps_for
from planish.passes.quantization._rounding import Blocks

_LEVELS = 127
_ZERO_POINT = 128
_TINY = 1e-30
"""Smallest scale of a row: a row of zeros stays zeros instead of becoming NaN."""


@dataclass(frozen=True)
class QuantizeInt8(QuantizationPass):
    """Quantize products with a constant matrix of at least ``minimum`` elements; everything else stays in float.

    Products that read the same activation share its quantization.
    """

    name: ClassVar[str] = "quantize-int8"

    activations: Literal["token", "tensor", "runtime", "static"] = "token"
    """Where activations get their scale: one per token (rows do not influence each other: a padded batch gives the
    same results as single rows), one per tensor (fewer operators, coarser, and rows do influence each other), left
    to the runtime, which sees float products with stored int8 weights, or fixed beforehand by calibration data."""

    range: RangeMethod = "mse"
    """How fixed scales follow from calibration data: all that was seen (`minmax`), the mean of the batches' extremes
    (`average`), 99.99 % (`percentile`), the closest distribution (`entropy`), or the least squared error (`mse`)."""

    signed: bool = False
    """Whether fixed scales are for int8 around zero; else for uint8 from the lowest to the highest entry."""

    reduced: bool = False
    """Give weights 7 bits: on x86 without VNNI two products of 8 bits overflow the 16 bits that they are added in."""

    method: Literal["nearest", "mse", "gptq"] = "nearest"
    """How a column is rounded: `nearest` keeps its whole range, `mse` the share with the least error; `gptq` chooses
    integers that keep the products with calibration data instead of the matrix itself."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """The range of each activation if scales are to be fixed, what products depend on for gptq."""
        kinds: list[type[Observer]] = [HistogramObserver] if self.activations == "static" else []
        kinds += [GramObserver] if self.method == "gptq" else []
        sites = self.candidates(model) if kinds else []
        return [*super().statistics(model), *(StatisticRequest(site.data, kind) for site in sites for kind in kinds)]

    def not_ready(self, site: MatMulSite) -> str | None:
        """Why a fixed scale cannot be given, or gptq cannot be done."""
        if self.activations != "static":
            return self.rounding(site).not_ready(site)
        return range_unready(site) or self.rounding(site).not_ready(site)

    def consume(self, model: ir.Model) -> None:
        """Find integers by gptq as soon as what they need was seen."""
        for site in self.candidates(model) if self.method == "gptq" else ():
            self.rounding(site).consume(site)

    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Write the integer form of each product."""
        shared = _Shared(model.graph, self)
        writers: dict[ir.Graph, _Writer] = {}
        for site in sites:  # activations are shared inside a graph alone: what one branch makes the other cannot read
            graph = site.node.graph
            if isinstance(graph, ir.Graph):
                writers.setdefault(graph, _Writer(graph, shared)).rewrite(site)

    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """The matrix as products will see it."""
        return self.columns(site).restored(site.tensor.numpy())

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """An activation as products will see it: in fixed steps, or in those of each row's or the tensor's largest."""
        if self.activations == "static":
            return self.steps(site).dequantized_input(data)
        over = None if self.activations == "tensor" else -1
        step = np.maximum(np.abs(data).max(axis=over, keepdims=True), _TINY) / _LEVELS
        return np.asarray(np.rint(data / step) * step, np.float32)

    def columns(self, site: MatMulSite) -> Blocks:
        """Scales of the columns of a matrix."""
        return self.rounding(site).blocks(site)

    def rounding(self, site: MatMulSite) -> Rounding:
        """One block for each column."""
        return Rounding(7 if self.reduced else 8, sizes_of(site.tensor)[0], symmetric=True, method=self.method)

    def steps(self, site: MatMulSite) -> Steps:
        """The fixed steps of an activation that was seen."""
        found = statistic_of(site.data, HistogramObserver)
        if found is None:
            raise ValueError(f"{site.data.name!r} was not seen")
        return steps_for(found, self.range, signed=self.signed)


@dataclass
class _Shared:
    """Constants of the integer form, in the main graph, which every subgraph can read."""

    graph: ir.Graph
    options: QuantizeInt8
    weights: dict[int, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    """Matrix in int8 and its scales, by the tensor that was rounded."""
    constants: dict[str, ir.Value] = field(default_factory=dict)

    def stored(self, site: MatMulSite) -> tuple[ir.Value, ir.Value]:
        """The matrix in int8 and its scales, one per column."""
        tensor, name = site.tensor, site.weight.name or ""
        if id(tensor) not in self.weights:
            blocks = self.options.columns(site)
            int8 = lazy(lambda: blocks.integers(tensor.numpy()), ir.DataType.INT8, sizes_of(tensor), f"{name}_int8")
            self.weights[id(tensor)] = (
                add_initializer(self.graph, f"{name}_int8", int8),
                add_initializer(self.graph, f"{name}_scale", blocks.scale[0]),
            )
        return self.weights[id(tensor)]

    def channel_scale(self, scale: ir.Value) -> ir.Value:
        """Scales of the columns; for rows in [-1, 1] also the size of one step."""
        if self.options.activations == "tensor" or scale.const_value is None:
            return scale
        return self.constant(f"{scale.name}_of_row", scale.const_value.numpy() / np.float32(_LEVELS))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant that is written once; one of an earlier run of this pass is taken again."""
        if name not in self.constants:
            earlier = self.graph.initializers.get(name)
            kept = None if earlier is None else constant_of(earlier)
            same = kept is not None and kept.dtype == array.dtype and np.array_equal(kept, array)
            self.constants[name] = earlier if earlier and same else add_initializer(self.graph, name, array)
        return self.constants[name]


@dataclass
class _Writer:
    """Writes the integer form of products into one graph, and remembers what they can share."""

    graph: ir.Graph
    shared: _Shared
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    """Quantized rows and their scale (per token or per tensor), by activation."""
    fixed: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Activations in fixed steps, by activation."""
    zero_points: dict[ir.Value, ir.Value | None] = field(default_factory=dict)

    def rewrite(self, site: MatMulSite) -> None:
        """Replace one product."""
        node, data, activations = site.node, site.data, self.shared.options.activations
        stored, scale = self.shared.stored(site)
        if activations in ("runtime", "static"):
            real = self._add(node, "weight", "DequantizeLinear", [stored, scale], {"axis": 1}, shape=site.weight.shape)
            node.replace_input_with(0, self._fixed(site) if activations == "static" else data)
            node.replace_input_with(1, real)
            return
        rows, size = self._rows(node, data)
        shape = node.outputs[0].shape
        integers = [rows, stored, self.zero_points[data]]
        sums = self._add(node, "int32", "MatMulInteger", integers, shape=shape, dtype=ir.DataType.INT32)
        real = self._add(node, "float", "Cast", [sums], {"to": ir.DataType.FLOAT}, shape=shape)
        columns = self._add(node, "columns", "Mul", [real, self.shared.channel_scale(scale)], shape=shape)
        replace_value(node.outputs[0], self._add(node, "rows", "Mul", [columns, size], shape=shape), "float")
        self.graph.remove(node, safe=True)

    def _fixed(self, site: MatMulSite) -> ir.Value:
        """The activation in fixed steps, made real again."""
        data = site.data
        if data not in self.fixed:
            steps = self.shared.options.steps(site)
            scale = self.shared.constant(f"{data.name}_scale", np.array(steps.scale, np.float32))
            zero = self.shared.constant(f"{data.name}_zero_point", np.array(steps.zero_point, steps.dtype))
            dtype = ir.DataType.from_numpy(steps.dtype)
            add = functools.partial(self._add, site.node, shape=data.shape)
            integers = add("steps", "QuantizeLinear", [data, scale, zero], dtype=dtype)
            self.fixed[data] = add("real", "DequantizeLinear", [integers, scale, zero])
        return self.fixed[data]

    def _rows(self, node: ir.Node, data: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The activation in uint8, and what its products must be multiplied by."""
        if data not in self.rows:
            make = self._per_tensor if self.shared.options.activations == "tensor" else self._per_token
            self.rows[data] = make(node, data)
        return self.rows[data]

    def _per_tensor(self, node: ir.Node, data: ir.Value) -> tuple[ir.Value, ir.Value]:
        quantize = self._insert(node, ("uint8", "scale", "zero_point"), "DynamicQuantizeLinear", [data])
        kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
        for output, shape, dtype in zip(quantize.outputs, (data.shape, ir.Shape([]), ir.Shape([])), kinds, strict=True):
            output.shape, output.type = shape, ir.TensorType(dtype)
        self.zero_points[data] = quantize.outputs[2]
        return quantize.outputs[0], quantize.outputs[1]

    def _per_token(self, node: ir.Node, data: ir.Value) -> tuple[ir.Value, ir.Value]:
        zero = self.shared.constant("int8_zero_point", np.array(_ZERO_POINT, np.uint8))
        axes = self.shared.constant("int8_axes", np.array([-1], np.int64))
        tiny = self.shared.constant("int8_tiny", np.array(_TINY, np.float32))
        step = self.shared.constant("int8_step", np.array(1 / _LEVELS, np.float32))
        row = None if data.shape is None else ir.Shape([*data.shape[:-1], 1])
        largest = self._add(node, "largest", "ReduceMax", [data, axes], {"keepdims": 1}, shape=row)
        smallest = self._add(node, "smallest", "ReduceMin", [data, axes], {"keepdims": 1}, shape=row)
        lowest = self._add(node, "lowest", "Neg", [smallest], shape=row)  # two reductions cost less than |x| in full
        size = self._add(node, "size", "Max", [largest, lowest, tiny], shape=row)
        unit = self._add(node, "unit", "Div", [data, size], shape=data.shape)
        self.zero_points[data] = zero
        rows = self._add(node, "uint8", "QuantizeLinear", [unit, step, zero], shape=data.shape, dtype=ir.DataType.UINT8)
        return rows, size

    def _add(
        self,
        node: ir.Node,
        what: str,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int] | None = None,
        *,
        shape: ir.Shape | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        output = self._insert(node, (what,), op_type, inputs, attributes).outputs[0]
        output.shape, output.type = shape, ir.TensorType(dtype)
        return output

    def _insert(
        self,
        node: ir.Node,
        what: tuple[str, ...],
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int] | None = None,
    ) -> ir.Node:
        """Put a node before ``node``: located where it is, its outputs named after its output and ``what`` they are."""
        base = node.outputs[0].name
        made = ir.node(op_type, inputs, attributes, num_outputs=len(what), name=f"{base}_{op_type}_{what[0]}")
        copy_location(node, made)
        for output, suffix in zip(made.outputs, what, strict=True):
            output.name = f"{base}_{suffix}"
        self.graph.insert_before(node, made)
        return made
