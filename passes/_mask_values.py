"""Which numbers a mask of attention may hold: what a row that sees no key gives depends on it.

Of a softmax over s + m, where every entry of a row of m is one number:

    m                        the softmax            `Where(IsNaN(p), 0, p)` behind it        the standard's Attention
    minus infinity           NaN                    zeros                                    zeros
    the lowest finite one    the mean of v          the mean of v                            the mean of v

ONNX Runtime's Attention takes the lowest finite number for minus infinity (seen with 1.31: zeros), the next one is a
number like others. NaN in a mask is NaN in the result there. OpenVINO's ReduceMax of minus infinity alone is the lowest
finite number (2026.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.optimizer.graph import constant_of

LOWEST = float(np.finfo(np.float32).min)
ABOVE_LOWEST = float(np.nextafter(np.float32(LOWEST), np.float32(0)))
_WIDE = 1e30
"""What is computed from activations stays far below the lowest number, or the model is broken anyway."""
_BEYOND = LOWEST * (1 + 2**-25)
"""From here on a sum in float is minus infinity."""
_MOVES = frozenset({
    "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class MaskValues:
    """Bounds of the finite entries of a value, and what others may be among them."""

    low: float
    high: float
    hides: bool = False
    """Minus infinity."""
    rises: bool = False
    """Plus infinity."""
    nan: bool = False

    def joined(self, other: MaskValues) -> MaskValues:
        """Of two values one of which stands at each place."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        hides, rises = self.hides or other.hides, self.rises or other.rises
        return MaskValues(low, high, hides, rises, self.nan or other.nan)


_FLAGS = MaskValues(0, 1)
_COMPUTED = MaskValues(-_WIDE, _WIDE)
_GIVEN = MaskValues(LOWEST, -LOWEST, hides=True, rises=True)


def mask_values(mask: ir.Value) -> MaskValues:
    """What a mask may hold. Integers that are not constant are taken for zeros and ones."""
    return _values(mask, {})


def _values(value: ir.Value | None, known: dict[ir.Value, MaskValues]) -> MaskValues:
    if value is None:
        return _FLAGS
    if value not in known:
        known[value] = _COMPUTED  # meanwhile: subgraphs may not lead in a circle, but nothing here depends on it
        known[value] = _found(value, known)
    return known[value]


def _found(value: ir.Value, known: dict[ir.Value, MaskValues]) -> MaskValues:
    array = constant_of(value)
    if array is not None and array.dtype.kind in "biuf":
        return _of_array(array)
    if value.dtype is not None and not value.dtype.is_floating_point():
        return _FLAGS
    node = value.producer()
    if node is None:
        return _GIVEN if value.is_graph_input() else _COMPUTED
    if node.domain != "":
        return _COMPUTED
    operands = [_values(operand, known) for operand in _operands(node)]
    if node.op_type == "ConstantOfShape":
        filled = node.attributes.get("value")
        return MaskValues(0, 0) if filled is None or filled.is_ref() else _of_array(filled.as_tensor().numpy())
    return _combined(node.op_type, operands)


def _operands(node: ir.Node) -> Sequence[ir.Value | None]:
    """Those of which entries of the result are made: not indices, shapes and conditions."""
    if node.op_type in _MOVES or node.op_type in ("Trilu", "Neg", "Pad"):
        return [node.inputs[0], *(node.inputs[2:3] if node.op_type == "Pad" else ())]
    return {"Where": node.inputs[1:], "ScatterND": [node.inputs[0], *node.inputs[2:]]}.get(
        node.op_type, node.inputs if node.op_type in ("Add", "Sub", "Mul", "Max", "Min", "Concat", "Sum") else ()
    )


def _combined(op_type: str, operands: list[MaskValues]) -> MaskValues:
    if not operands:
        return _COMPUTED
    first = operands[0]
    if op_type == "Neg":
        return MaskValues(-first.high, -first.low, first.rises, first.hides, first.nan)
    total = first
    for other in operands[1:]:
        total = _pair(op_type, total, other)
    return total.joined(MaskValues(0, 0)) if op_type in ("Trilu", "Pad") else total


def _pair(op_type: str, one: MaskValues, other: MaskValues) -> MaskValues:
    hides, rises, nan = one.hides or other.hides, one.rises or other.rises, one.nan or other.nan
    match op_type:
        case "Add" | "Sum":
            bounds = (one.low + other.low, one.high + other.high)
        case "Sub":
            bounds = (one.low - other.high, one.high - other.low)
            hides, rises = one.hides or other.rises, one.rises or other.hides
        case "Mul":
            products = [a * b for a in (one.low, one.high) for b in (other.low, other.high)]
            bounds = (min(products), max(products))
            hides = rises = hides or rises
        case "Max":  # what is raised to a number is minus infinity no more
            bounds = (max(one.low, other.low), max(one.high, other.high))
            hides = one.hides and other.hides
        case "Min":
            bounds = (min(one.low, other.low), min(one.high, other.high))
        case _:
            return one.joined(other)
    hides, rises = hides or bounds[0] < _BEYOND, rises or bounds[1] > -_BEYOND
    return MaskValues(max(bounds[0], LOWEST), min(bounds[1], -LOWEST), hides, rises, nan)


def _of_array(array: np.ndarray) -> MaskValues:
    numbers = np.asarray(array, np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    minus, plus, nan = (bool(test(numbers).any()) for test in (np.isneginf, np.isposinf, np.isnan))
    return MaskValues(low, high, minus, plus, nan)


def number(tape: ir.tape.Tape, value: float) -> ir.Value:
    """A constant of type FLOAT without axes."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, np.float32))})
