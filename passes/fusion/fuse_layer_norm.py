"""Raise layer normalization to the standard's operator.

Before:  m = ReduceMean (x, {-1});  d = Sub (x, m);  q = Pow (d, 2);  v = ReduceMean (q, {-1});  e = Add (v, 1e-12)
         s = Sqrt (e);  n = Div (d, s);  g = Mul (n, scale);  r = Add (g, bias)
After:   r = LayerNormalization <axis=-1, epsilon=1e-12> (x, scale, bias)

Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4. ONNX: LayerNormalization, opset 17.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import NearMiss, RewritePass
from planish.optimizer.ir.graph import producer_of, rank_of
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
class LayerNormMatch:
    """A match: operands, the final value, and the two means, which must be over the last axis."""

    x: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    epsilon: float
    means: tuple[ir.Node, ir.Node]
    result: ir.Value


@dataclass(frozen=True)
class FuseLayerNorm(RewritePass[LayerNormMatch]):
    """Fuse (x - mean) / √(variance + ε) · scale [+ bias] over the last axis."""

    name: ClassVar[str] = "fuse-layer-norm"
    root: ClassVar[str] = "Sqrt"
    since: ClassVar[int] = 17

    def pattern(self, node: ir.Node) -> LayerNormMatch | None:
        """Match from the square root: inside for the variance of x, outside for scale and bias."""
        for variance, epsilon in with_constant(producer_of(node.inputs[0], "Add")):
            outer = producer_of(variance, "ReduceMean")
            for deviation in squared(None if outer is None else outer.inputs[0]):
                inner = _mean_of(deviation)
                if outer is None or inner is None or inner.inputs[0] is None:
                    continue
                quotient = quotient_by(node.outputs[0])
                if quotient is None or not _same(quotient[0], deviation):
                    raise NearMiss("its deviation is not what is divided by the root", node.outputs[0])
                affine = _affine(quotient[1])
                if affine is None:
                    raise NearMiss("its quotient has no constant scale", quotient[1])
                return LayerNormMatch(inner.inputs[0], affine[0], affine[1], epsilon, (inner, outer), affine[2])
        return None

    def check(self, match: LayerNormMatch) -> None:
        """Check for means over the last axis that keep it, and scale and bias of rank one."""
        for mean in match.means:
            check_mean(mean, match.x)
        check_rank(match.result, match.x)
        for name, value in (("scale", match.scale), ("bias", match.bias)):
            if value is not None:
                check_vector(name, value, match.x)

    def rewrite(self, match: LayerNormMatch) -> tuple[ir.Value, list[ir.Node]]:
        """Build one node."""
        inputs = [match.x, match.scale] + ([match.bias] if match.bias is not None else [])
        return match.result, [ir.node("LayerNormalization", inputs, {"axis": -1, "epsilon": match.epsilon})]


def _mean_of(deviation: ir.Value) -> ir.Node | None:
    """The mean m of d = x - m, if it is the mean of that x."""
    difference = producer_of(deviation, "Sub")
    mean = None if difference is None else producer_of(difference.inputs[1], "ReduceMean")
    return mean if mean is not None and difference is not None and mean.inputs[0] is difference.inputs[0] else None


def _same(one: ir.Value, other: ir.Value) -> bool:
    """True if two deviations are one value, or two subtractions of the same operands."""
    left, right = producer_of(one, "Sub"), producer_of(other, "Sub")
    return one is other or (left is not None and right is not None and list(left.inputs) == list(right.inputs))


def _affine(quotient: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value] | None:
    """Scale, bias and result of quotient · scale + bias; the bias is optional."""
    product = used_by(quotient, "Mul")
    scale = None if product is None else other_operand(product, quotient)
    if product is None or scale is None or not is_plain_constant(scale):
        return None
    total = used_by(product.outputs[0], "Add")
    bias = None if total is None else other_operand(total, product.outputs[0])
    fits = is_plain_constant(bias) and bias is not None and bias.shape == scale.shape and rank_of(bias) == 1
    if total is not None and fits:
        return scale, bias, total.outputs[0]
    return scale, None, product.outputs[0]
