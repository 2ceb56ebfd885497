"""Raise the Gaussian error linear unit to the standard's operator.

Before:  a = Div (x, 1.4142);  b = Erf (a);  c = Add (b, 1);  d = Mul (x, c);  r = Mul (d, 0.5)
After:   r = Gelu (x)

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units": exact (erf) and approximate (tanh) form. ONNX: Gelu, opset 20.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import NearMiss, Refused, RewritePass
from planish.optimizer.ir.graph import producer_of, scalar_of
from planish.passes.fusion._match import check_rank, other_operand, used_by, with_constant

_TOLERANCE = 1e-4
_CUBE = 0.044715


@dataclass(frozen=True)
class Gelu:
    """A match: the input, the final Mul, and the approximation."""

    x: ir.Value
    result: ir.Value
    approximate: str


@dataclass(frozen=True)
class FuseGelu(RewritePass[Gelu]):
    """Fuse x · ½ · (1 + erf(x / √2)) and x · ½ · (1 + tanh(√(2/π) · (x + 0.044715 x³))), factors in any order."""

    name: ClassVar[str] = "fuse-gelu"
    root: ClassVar[str] = "Add"
    since: ClassVar[int] = 20

    def pattern(self, node: ir.Node) -> Gelu | None:
        """Match from `1 + erf(…)` or `1 + tanh(…)`: inside for x, outside for the product with x and ½."""
        inner = next((value for value, number in with_constant(node) if number == 1.0), None)
        curve = producer_of(inner, "Erf", "Tanh")
        if curve is None:
            return None
        # Several values may match x (x·x·x has many factors); the outer product decides.
        arguments = list(_erf_arguments(curve) if curve.op_type == "Erf" else _tanh_arguments(curve))
        kind = "none" if curve.op_type == "Erf" else "tanh"
        for x in arguments:
            result = _product(node.outputs[0], x)
            if result is not None:
                return Gelu(x, result, kind)
        if arguments:
            raise NearMiss("its curve is not multiplied with its input and one half", node.outputs[0])
        raise NearMiss("the argument of its curve is none of a Gelu", curve.inputs[0])

    def check(self, match: Gelu) -> None:
        """Check that the type is floating point, and that the rank does not change."""
        check_rank(match.result, match.x)
        if match.x.dtype is not None and not match.x.dtype.is_floating_point():
            raise Refused(f"Gelu is not defined for {match.x.dtype}", match.x)

    def rewrite(self, match: Gelu) -> tuple[ir.Value, list[ir.Node]]:
        """Build one node."""
        return match.result, [ir.node("Gelu", [match.x], {"approximate": match.approximate})]


def _near(number: float, wanted: float) -> bool:
    return math.isclose(number, wanted, rel_tol=_TOLERANCE)


def _erf_arguments(curve: ir.Node) -> Iterator[ir.Value]:
    """x of erf(x / √2) or erf(x · 0.7071)."""
    inner = producer_of(curve.inputs[0], "Div", "Mul")
    if inner is None:
        return
    if inner.op_type == "Div":
        number = scalar_of(inner.inputs[1])
        if number is not None and inner.inputs[0] is not None and _near(number, math.sqrt(2)):
            yield inner.inputs[0]
        return
    yield from (value for value, number in with_constant(inner) if _near(number, math.sqrt(0.5)))


def _tanh_arguments(curve: ir.Node) -> Iterator[ir.Value]:
    """x of tanh(√(2/π) · (x + 0.044715 · x³)), for any order of sums and products."""
    slope = math.sqrt(2 / math.pi)
    wanted = (0.0, slope, 0.0, slope * _CUBE)
    for x in _below(curve.inputs[0]):
        coefficients = _polynomial(curve.inputs[0], x)
        if coefficients is None:
            continue
        # A coefficient of zero must be exact: a small one is a term of another function.
        if all(_near(a, b) if b else a == 0.0 for a, b in zip(coefficients, wanted, strict=True)):
            yield x


def _below(value: ir.Value | None, depth: int = 5) -> list[ir.Value]:
    """The operands of sums, products and powers, nearest first, each once."""
    node = producer_of(value, "Add", "Mul", "Pow")
    inputs = [v for v in (() if node is None or depth == 0 else node.inputs) if v is not None and scalar_of(v) is None]
    deeper = [operand for v in inputs for operand in _below(v, depth - 1)]
    # Each once: x³ has the same operand several times.
    return list({id(operand): operand for operand in (*inputs, *deeper)}.values())


_Coefficients = tuple[float, float, float, float]


def _polynomial(value: ir.Value | None, x: ir.Value) -> _Coefficients | None:
    """Coefficients of 1, x, x² and x³ in ``value``; None if it is no such polynomial."""
    if value is x:
        return (0.0, 1.0, 0.0, 0.0)
    number = scalar_of(value)
    if number is not None:
        return (number, 0.0, 0.0, 0.0)
    node = producer_of(value, "Add", "Mul", "Pow")
    left = None if node is None else _polynomial(node.inputs[0], x)
    if node is None or left is None:
        return None
    if node.op_type == "Pow":
        exponent = scalar_of(node.inputs[1])
        return _times(left, left if exponent == 2 else _times(left, left)) if exponent in (2, 3) else None
    right = _polynomial(node.inputs[1], x)
    if node.op_type == "Mul":
        return _times(left, right)
    return None if right is None else (left[0] + right[0], left[1] + right[1], left[2] + right[2], left[3] + right[3])


def _times(left: _Coefficients, right: _Coefficients | None) -> _Coefficients | None:
    """The product of two polynomials, if its degree is at most three."""
    if right is None:
        return None
    product = [0.0] * 7
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    # Degrees above three occur in no Gelu.
    return None if any(product[4:]) else (product[0], product[1], product[2], product[3])


def _product(curve: ir.Value, x: ir.Value) -> ir.Value | None:
    """The value x · ½ · curve, for any order of the factors."""
    first = used_by(curve, "Mul")
    if first is None:
        return None
    other = other_operand(first, curve)
    if any(value is x and number == 0.5 for value, number in with_constant(producer_of(other, "Mul"))):
        return first.outputs[0]
    halved = producer_of(other, "Div")
    if halved is not None and halved.inputs[0] is x and scalar_of(halved.inputs[1]) == 2.0:
        return first.outputs[0]
    second = used_by(first.outputs[0], "Mul")
    if second is None:
        return None
    last = other_operand(second, first.outputs[0])
    fits = (other is x and scalar_of(last) == 0.5) or (scalar_of(other) == 0.5 and last is x)
    return second.outputs[0] if fits else None
