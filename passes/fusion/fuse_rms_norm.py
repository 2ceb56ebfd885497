"""Raise root mean square normalization to the standard's operator.

Before:  q = Pow (x, 2);  m = ReduceMean (q, {-1});  e = Add (m, 1e-06);  s = Sqrt (e);  i = Reciprocal (s)
         n = Mul (x, i);  r = Mul (scale, n)
After:   r = RMSNormalization <axis=-1, epsilon=1e-06> (x, scale)

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4. ONNX: RMSNormalization, opset 23.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import NearMiss, Refused, RewritePass
from planish.optimizer.ir.graph import rank_of
from planish.passes.fusion._match import (
    check_mean,
    check_rank,
    check_vector,
    is_plain_constant,
    other_operand,
    quotient_by,
    squared,
    used_by,
    with_constant,
)


@dataclass(frozen=True)
class RmsNorm:
    """A match: operands, the final value, and the mean, which must be over the last axis."""

    x: ir.Value
    scale: ir.Value | None
    epsilon: float
    mean: ir.Node
    normalized: ir.Value
    result: ir.Value


@dataclass(frozen=True)
class FuseRmsNorm(RewritePass[RmsNorm]):
    """Fuse x / √(mean(x²) + ε) · scale over the last axis, for every exported form of the quotient."""

    name: ClassVar[str] = "fuse-rms-norm"
    root: ClassVar[str] = "ReduceMean"
    since: ClassVar[int] = 23

    def pattern(self, node: ir.Node) -> RmsNorm | None:
        """Match from the mean of squares: inside for x, outside for the quotient and its scale."""
        for x in squared(node.inputs[0]):
            for root, epsilon in _roots(node.outputs[0]):
                quotient = quotient_by(root)
                if quotient is None or quotient[0] is not x:
                    raise NearMiss("what is divided by the root is not what was squared", root)
                scale, result = _scaled(quotient[1])
                return RmsNorm(x, scale, epsilon, node, quotient[1], result)
        return None

    def check(self, match: RmsNorm) -> None:
        """Check for a mean over the last axis that keeps it, and a constant scale of rank one."""
        check_mean(match.mean, match.x)
        check_rank(match.result, match.x)
        if match.scale is None:
            raise Refused("it has no constant scale of one dimension", match.normalized)
        check_vector("scale", match.scale, match.x)
        if match.scale.dtype is not None and match.x.dtype is not None and match.scale.dtype != match.x.dtype:
            raise Refused(f"its scale is {match.scale.dtype}, what it scales is {match.x.dtype}", match.scale)

    def rewrite(self, match: RmsNorm) -> tuple[ir.Value, list[ir.Node]]:
        """Build one node."""
        attributes = {"axis": -1, "epsilon": match.epsilon}
        return match.result, [ir.node("RMSNormalization", [match.x, match.scale], attributes)]


def _roots(mean: ir.Value) -> Iterator[tuple[ir.Value, float]]:
    """√(mean + ε) and ε."""
    total = used_by(mean, "Add")
    for value, epsilon in with_constant(total):
        root = None if total is None else used_by(total.outputs[0], "Sqrt")
        if value is mean and root is not None:
            yield root.outputs[0], epsilon


def _scaled(normalized: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """The scale of rank one and the result; without a scale, the quotient itself."""
    product = used_by(normalized, "Mul")
    scale = None if product is None else other_operand(product, normalized)
    if product is None or scale is None or not is_plain_constant(scale) or rank_of(scale) != 1:
        return None, normalized
    return scale, product.outputs[0]
