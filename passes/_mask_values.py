"""Value ranges of attention masks, which determine the result of a fully masked row.

For a softmax over s + m, where every entry of a row of m is one number:

    m                        the softmax            `Where(IsNaN(p), 0, p)` behind it        the standard's Attention
    minus infinity           NaN                    zeros                                    zeros
    the lowest finite one    the mean of v          the mean of v                            the mean of v

ONNX Runtime's Attention treats the lowest finite number as minus infinity (1.31: zeros); the next number is a number
like others. NaN in a mask is NaN in the result there. OpenVINO's ReduceMax of minus infinity alone is the lowest finite
number (2026.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.graph import constant_of

LOWEST = float(np.finfo(np.float32).min)
_WIDE = 1e30
"""Bound of activations, far below the lowest finite number in any valid model."""
_MOVES = frozenset({
    "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "ReduceMax", "ReduceMin",
    "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
_JOINS = frozenset({"Add", "Concat", "Max", "Min", "Mul", "Sub", "Sum"})
_SCATTERS = frozenset({"Scatter", "ScatterElements", "ScatterND"})
_WITHIN_ONE = frozenset({"Cos", "Erf", "HardSigmoid", "Sigmoid", "Sign", "Sin", "Softmax", "Softsign", "Tanh"})
_ACTIVATIONS = frozenset({
    "Attention", "BatchNormalization", "Conv", "DequantizeLinear", "Einsum", "Gelu", "Gemm", "GroupNormalization",
    "InstanceNormalization", "LayerNormalization", "MatMul", "MatMulInteger", "QLinearMatMul", "RMSNormalization",
    "RotaryEmbedding",
})  # fmt: skip
"""Operators of layers: their results are taken to be finite, since a sum of minus infinity and weights would be NaN."""


@dataclass(frozen=True)
class MaskValues:
    """Bounds of the finite entries of a value, and its possible infinities and NaN."""

    low: float
    high: float
    hides: bool = False
    """True if minus infinity is possible."""
    rises: bool = False
    """True if plus infinity is possible."""
    nan: bool = False

    def joined(self, other: MaskValues) -> MaskValues:
        """The range of a value whose entries come from either of two values."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        hides, rises = self.hides or other.hides, self.rises or other.rises
        return MaskValues(low, high, hides, rises, self.nan or other.nan)


_FLAGS = MaskValues(0, 1)


def lowest(dtype: ir.DataType | None) -> float:
    """The lowest finite number of a type; that of FLOAT if the type is unknown."""
    return -_largest(dtype)[0]


def _largest(dtype: ir.DataType | None) -> tuple[float, float]:
    """The largest finite number, and the bound from which results round to infinity."""
    kind = dtype if dtype is not None and dtype.is_floating_point() else ir.DataType.FLOAT
    largest = float(kind.max)
    return largest, largest * (1 + float(kind.eps) / 4)


def _given(dtype: ir.DataType | None) -> MaskValues:
    """The unbounded range: of inputs, and of operators without a rule."""
    return MaskValues(lowest(dtype), -lowest(dtype), hides=True, rises=True)


def _computed(dtype: ir.DataType | None) -> MaskValues:
    bound = min(_WIDE, -lowest(dtype) / 4)
    return MaskValues(-bound, bound)


def mask_values(mask: ir.Value) -> MaskValues:
    """The range of a mask. Integers that are not constant are taken to be 0 or 1."""
    return _values(mask, {})


def _values(value: ir.Value | None, ranges: dict[ir.Value, MaskValues]) -> MaskValues:
    if value is None:
        return _FLAGS
    if value not in ranges:
        ranges[value] = _given(value.dtype)  # meanwhile: subgraphs may not lead in a circle, but nothing depends on it
        ranges[value] = _range_of(value, ranges)
    return ranges[value]


def _range_of(value: ir.Value, ranges: dict[ir.Value, MaskValues]) -> MaskValues:
    array = constant_of(value)
    if array is not None and array.dtype.kind in "biufV":  # V: bfloat16 and the like
        return _of_array(array)
    if value.dtype is not None and not value.dtype.is_floating_point():
        return _FLAGS
    node = value.producer()
    if node is None or node.domain != "":
        return _given(value.dtype)
    match node.op_type:
        case "ConstantOfShape":
            filled = node.attributes.get("value")
            return MaskValues(0, 0) if filled is None or filled.is_ref() else _of_array(filled.as_tensor().numpy())
        case "If":
            branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
            then, other = (_values(branch.outputs[value.index() or 0], ranges) for branch in branches)
            return then.joined(other)
        case kind if kind in _WITHIN_ONE:
            return MaskValues(-1, 1)
        case kind if kind in _ACTIVATIONS:
            return _computed(value.dtype)
    return _combined(node, [_values(operand, ranges) for operand in _operands(node)], value.dtype)


def _operands(node: ir.Node) -> Sequence[ir.Value | None]:
    """The operands that become entries of the result (not indices, shapes, conditions); empty for operators without a
    rule."""
    kind, inputs = node.op_type, node.inputs
    if kind in _MOVES or kind in ("Trilu", "Neg", "Relu"):
        return inputs[:1]
    if kind in _SCATTERS:  # sums and products of any number of entries are not followed
        reduction = node.attributes.get("reduction")
        return [inputs[0], inputs[2]] if reduction is None or reduction.as_string() in ("none", "max", "min") else ()
    if kind == "Pad":
        return [inputs[0], *inputs[2:3]]
    if kind == "Where":
        return inputs[1:]
    return inputs if kind in _JOINS or kind in ("Clip", "Div") else ()


def _combined(node: ir.Node, operands: list[MaskValues], dtype: ir.DataType | None) -> MaskValues:
    if not operands:
        return _given(dtype)
    total = operands[0]
    match node.op_type:
        case "Neg":
            return MaskValues(-total.high, -total.low, total.rises, total.hides, total.nan)
        case "Cast":
            return _rounded(total, ir.DataType(node.attributes["to"].as_int()))
        case "Relu":
            return _pair("Max", total, MaskValues(0, 0), dtype)
        case "Clip":  # without a bound ONNX Runtime makes the lowest number of minus infinity
            start = _given(dtype) if total.hides or total.rises else total
            for kind, bound, values in zip(("Max", "Min"), node.inputs[1:], operands[1:], strict=False):
                start = start if bound is None else _pair(kind, start, values, dtype)
            return start
        case "Div":
            divisor = operands[1]
            if divisor.hides or divisor.rises or divisor.nan or divisor.low <= 0 <= divisor.high:
                return _given(dtype)
            return _pair("Mul", total, MaskValues(1 / divisor.high, 1 / divisor.low), dtype)
    for other in operands[1:]:
        total = _pair(node.op_type, total, other, dtype)
    return total.joined(MaskValues(0, 0)) if node.op_type in ("Trilu", "Pad") else total


def _pair(op_type: str, one: MaskValues, other: MaskValues, dtype: ir.DataType | None) -> MaskValues:
    hides, rises, nan = one.hides or other.hides, one.rises or other.rises, one.nan or other.nan
    low, high = min(one.low, other.low), max(one.high, other.high)
    match op_type:
        case "Add" | "Sum":
            low, high = one.low + other.low, one.high + other.high
        case "Sub":
            low, high = one.low - other.high, one.high - other.low
            hides, rises = one.hides or other.rises, one.rises or other.hides
        case "Mul":
            products = [a * b for a in (one.low, one.high) for b in (other.low, other.high)]
            low, high = min(products), max(products)
            hides = rises = hides or rises
        case "Max":  # what is raised to a number is minus infinity no more, but that number
            floors = [values.low for values in (one, other) if not values.hides]
            low, hides = max(floors, default=low), not floors
        case "Min":
            ceilings = [values.high for values in (one, other) if not values.rises]
            high, rises = min(ceilings, default=high), not ceilings
    return _rounded(MaskValues(low, high, hides, rises, nan), dtype)


def _rounded(values: MaskValues, dtype: ir.DataType | None) -> MaskValues:
    """The range after a conversion to a type."""
    largest, beyond = _largest(dtype)
    hides, rises = values.hides or values.low < -beyond, values.rises or values.high > beyond
    return MaskValues(max(values.low, -largest), min(values.high, largest), hides, rises, values.nan)


def _of_array(array: np.ndarray) -> MaskValues:
    numbers = np.asarray(array, np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    minus, plus, nan = (bool(test(numbers).any()) for test in (np.isneginf, np.isposinf, np.isnan))
    return MaskValues(low, high, minus, plus, nan)


def number(tape: ir.tape.Tape, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """A scalar constant."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, dtype.numpy()), dtype)})


def above_lowest(tape: ir.tape.Tape, dtype: ir.DataType) -> ir.Value:
    """The second lowest finite number, as a constant."""
    low = np.array(lowest(dtype), dtype.numpy())
    return number(tape, float(np.nextafter(low, np.zeros_like(low))), dtype)
