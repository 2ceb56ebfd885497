"""Raise scaled dot-product attention to the standard's operator.

Before:  t = Transpose <perm=[0,1,3,2]> (k);  a = MatMul (q, t);  b = Div (a, 8);  c = Add (b, mask)
         p = Softmax <axis=-1> (c);  r = MatMul (p, v)
After:   r = Attention <scale=0.125> (q, k, v, mask)

Vaswani et al. 2017, "Attention Is All You Need", equation 1. ONNX: Attention, opset 23. The mask is spread over the
queries where it is not known to have a row for each: no CPU runtime repeats it along that axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from planish.optimizer.graph import rank_of, scalar_of
from planish.optimizer.shapes import Followed, dims_of
from planish.passes.fusion._fusion import Declined, Fusion, made_by, other_operand, used_by

_RANK = 4


@dataclass(frozen=True)
class Scaled:
    """A value without the constant factors that were multiplied to it, and their product."""

    value: ir.Value
    factor: float = 1.0


@dataclass(frozen=True)
class Turned:
    """Keys before they were transposed, and the permutation that brings them to (batch, heads, keys, size)."""

    source: ir.Value
    perm: tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """A match: operands, mask, the whole scale, the probabilities and the result."""

    query: ir.Value
    key: Turned | None
    """Where the transposed keys come from; None if nothing is known to transpose them."""
    transposed: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    softmax: ir.Node
    probabilities: ir.Value
    result: ir.Value


@dataclass(frozen=True)
class FuseAttention(Fusion[Attention]):
    """Fuse softmax(q · kᵀ · scale + mask) · v, scale factors wherever they stand, guarded against NaN or not."""

    name: ClassVar[str] = "fuse-attention"
    root: ClassVar[str] = "Softmax"
    since: ClassVar[int] = 23

    def pattern(self, node: ir.Node) -> Attention | None:
        """From the softmax look inside for scores and mask, and outside for the product with the values."""
        probabilities = _guarded(node.outputs[0])
        product = used_by(probabilities, "MatMul") or _any_product(probabilities)
        inner = _scores(node.inputs[0])
        if product is None or inner is None or product.inputs[0] is not probabilities or product.inputs[1] is None:
            return None
        scores, mask = inner
        matmul = made_by(scores.value, "MatMul")
        if matmul is None or matmul.inputs[0] is None or matmul.inputs[1] is None:
            return None
        query, turned = _unscaled(matmul.inputs[0]), _unscaled(matmul.inputs[1])
        key = _turned_key(turned.value)
        scale = scores.factor * query.factor * turned.factor
        return Attention(
            query.value, key, turned.value, product.inputs[1], mask, scale, node, probabilities, product.outputs[0]
        )

    def check(self, match: Attention) -> None:
        """Four dimensions, softmax and transposition over the last ones, and nobody else who reads inside."""
        axis = match.softmax.attributes.get("axis")
        if axis is not None and axis.as_int() not in (-1, _RANK - 1):
            raise Declined(f"its softmax runs over axis {axis.as_int()}", match.softmax)
        if match.key is None:
            raise Declined("its keys are not seen to be transposed", match.transposed)
        if len(match.key.perm) != _RANK:
            raise Declined(
                f"its keys have rank {len(match.key.perm)}, attention is written for {_RANK}", match.transposed
            )
        for name, value in (("queries", match.query), ("values", match.value)):
            if rank_of(value) not in (None, _RANK):
                raise Declined(f"its {name} have rank {rank_of(value)}, attention is written for {_RANK}", value)
        if used_by(match.probabilities, "MatMul") is None:
            raise Declined("its probabilities are read by another node as well", match.probabilities)

    def rewrite(self, match: Attention) -> tuple[ir.Value, list[ir.Node]]:
        """Keys the right way round, the mask spread, and one node."""
        key, nodes = _keys(match)
        inputs: list[ir.Value | None] = [match.query, key, match.value]
        if match.mask is not None:
            mask, spreading = _spread(match.mask, match.query)
            inputs.append(mask)
            nodes += spreading
        return match.result, [*nodes, ir.node("Attention", inputs, {"scale": match.scale})]


def _guarded(probabilities: ir.Value) -> ir.Value:
    """What `Where(IsNaN(p), 0, p)` makes of p, or p itself."""
    for user in [use.node for use in probabilities.uses()]:
        test = used_by(user.outputs[0], "Where") if user.op_type == "IsNaN" else None
        if test is not None and test.inputs[2] is probabilities and scalar_of(test.inputs[1]) == 0.0:
            return test.outputs[0]
    return probabilities


def _any_product(value: ir.Value) -> ir.Node | None:
    """A product that reads ``value`` among other nodes: matched, so that the check can say why it is refused."""
    return next((use.node for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 0), None)


def _scores(value: ir.Value | None) -> tuple[Scaled, ir.Value | None] | None:
    """Scores and mask of the argument of the softmax."""
    if value is None:
        return None
    plain = _unscaled(value)
    if made_by(plain.value, "MatMul") is not None:
        return plain, None
    add = made_by(value, "Add")
    for operand in () if add is None else add.inputs:
        scores = None if operand is None else _unscaled(operand)
        if (
            add is not None
            and operand is not None
            and scores is not None
            and made_by(scores.value, "MatMul") is not None
        ):
            return scores, other_operand(add, operand)
    return None


def _unscaled(value: ir.Value) -> Scaled:
    """Strip products and quotients with one number off a value that nobody else reads."""
    factor = 1.0
    while (node := made_by(value, "Mul", "Div")) is not None:
        left, right = node.inputs[0], node.inputs[1]
        number = scalar_of(right)
        if number is not None and left is not None:
            value, factor = left, factor * (number if node.op_type == "Mul" else 1 / number)
        elif node.op_type == "Mul" and (number := scalar_of(left)) is not None and right is not None:
            value, factor = right, factor * number
        else:
            break
    return Scaled(value, factor)


def _turned_key(value: ir.Value) -> Turned | None:
    """What was transposed to ``value``: by one Transpose, or flattened to rank three, transposed and put back."""
    transpose = made_by(value, "Transpose")
    if transpose is not None:
        perm = transpose.attributes.get("perm")
        order = list(perm.as_ints()) if perm is not None else []
        if transpose.inputs[0] is None or len(order) < 2:
            return None
        order[-1], order[-2] = order[-2], order[-1]
        return Turned(transpose.inputs[0], tuple(order))
    outer = made_by(value, "Reshape")
    middle = made_by(None if outer is None else outer.inputs[0], "Transpose")
    inner = made_by(None if middle is None else middle.inputs[0], "Reshape")
    source = None if inner is None else inner.inputs[0]
    if outer is None or middle is None or inner is None or source is None or outer.graph is None:
        return None
    known = Followed.through(outer.graph)
    dims, flat, back = dims_of(source.shape), known.entries(inner.inputs[1]), known.entries(outer.inputs[1])
    swaps = middle.attributes.get("perm")
    plain = swaps is not None and list(swaps.as_ints()) == [0, 2, 1] and None not in dims and len(dims) == _RANK
    if plain and flat == [-1, *dims[2:]] and back == [*dims[:2], dims[3], dims[2]]:
        return Turned(source, tuple(range(_RANK)))
    return None


def _keys(match: Attention) -> tuple[ir.Value, list[ir.Node]]:
    """Keys as (batch, heads, keys, size)."""
    if match.key is None:
        raise Declined("its keys are not seen to be transposed", match.transposed)
    if match.key.perm == tuple(range(_RANK)):
        return match.key.source, []
    turned = ir.node("Transpose", [match.key.source], {"perm": list(match.key.perm)})
    return turned.outputs[0], [turned]


def _spread(mask: ir.Value, query: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """The mask with one row per query; nothing to do if it has them already."""
    rows = None if mask.shape is None or len(mask.shape) < 2 else mask.shape[-2]
    queries = None if query.shape is None else query.shape[-2]
    same = isinstance(rows, ir.SymbolicDim) and isinstance(queries, ir.SymbolicDim) and rows == queries
    if (isinstance(rows, int) and rows != 1) or (same and rows is not None):
        return mask, []
    start = ir.node("Shape", [query], {"start": _RANK - 2, "end": _RANK - 1})
    one = ir.node("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    target = ir.node("Concat", [start.outputs[0], one.outputs[0]], {"axis": 0})
    spread = ir.node("Expand", [mask, target.outputs[0]])
    return spread.outputs[0], [start, one, target, spread]
