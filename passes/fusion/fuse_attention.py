"""Raise scaled dot-product attention to the standard's operator.

Before:  t = Transpose <perm=[0,1,3,2]> (k);  a = MatMul (q, t);  b = Div (a, 8);  c = Add (b, mask)
         p = Softmax <axis=-1> (c);  r = MatMul (p, v)
After:   r = Attention <scale=0.125> (q, k, v, mask)

Vaswani et al. 2017, "Attention Is All You Need", equation 1; capped scores: Gemma 2, 2024, section 2. ONNX: Attention,
opset 23. The mask is spread over the queries where it is not known to have a row for each: no CPU runtime repeats it
along that axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import NearMiss, Refused, RewritePass
from planish.optimizer.ir.data_propagation import PropagatedInts, dims_of
from planish.optimizer.ir.edit import rows_for
from planish.optimizer.ir.graph import SPELLED_OUT, producer_of, rank_of, scalar_of
from planish.passes._mask_values import MaskValues, above_lowest, lowest, mask_values, number
from planish.passes.fusion._match import used_by

_RANK = 4


@dataclass(frozen=True)
class ScaledValue:
    """A value without its constant factors, and their product."""

    value: ir.Value
    factor: float = 1.0


@dataclass(frozen=True)
class Turned:
    """Keys before their transposition, and the permutation to (batch, heads, keys, size)."""

    source: ir.Value
    perm: tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """A match: the softmax, the MatMul with the values, and the structure of the scores."""

    softmax: ir.Node
    probabilities: ir.Value
    product: ir.Node
    scores: Scores | None
    """Structure of the scores; None if they are not one MatMul of two matrices."""
    guarded: bool
    """True if NaN of the softmax is replaced by zeros."""


@dataclass(frozen=True)
class Scores:
    """The argument of a softmax: the MatMul of queries and keys, scaled, capped, and the added masks."""

    query: ir.Value
    key: Turned | None
    """The keys before their transposition; None if no transposition is known."""
    transposed: ir.Value
    scale: float
    softcap: float
    """Cap of the scaled scores by tanh; 0 for none."""
    masks: tuple[ir.Value, ...]


@dataclass(frozen=True)
class FuseAttention(RewritePass[Attention]):
    """Fuse softmax(cap(q · kᵀ · scale) + masks) · v, scale factors wherever they stand, capped and guarded or not."""

    name: ClassVar[str] = "fuse-attention"
    root: ClassVar[str] = "Softmax"
    since: ClassVar[int] = 23

    def pattern(self, node: ir.Node) -> Attention | None:
        """A softmax whose result is the left operand of a MatMul."""
        probabilities = _guarded(node.outputs[0])
        readers = [use.node for use in probabilities.uses() if use.node.op_type == "MatMul" and use.idx == 0]
        scores = None if node.inputs[0] is None else _scores(node.inputs[0])
        if not readers and _flattened(probabilities):
            raise NearMiss("its probabilities are reshaped before they meet the values", probabilities)
        # A constant right operand is the softmax of a classifier or a router, not attention.
        if not readers and scores is not None and scores.transposed.const_value is None:
            raise NearMiss("its probabilities are not multiplied, from the left, with a matrix", probabilities)
        guarded = probabilities is not node.outputs[0]
        return Attention(node, probabilities, readers[0], scores, guarded) if readers else None

    def check(self, match: Attention) -> None:
        """Check for four dimensions, softmax and transposition over the last ones, and no other readers inside."""
        # A legalization decomposed it: a second run of the pipeline must not undo that.
        if SPELLED_OUT in match.softmax.metadata_props:
            raise Refused(f"{match.softmax.metadata_props[SPELLED_OUT]} spelled it out", match.softmax)
        axis = match.softmax.attributes.get("axis")
        if axis is not None and axis.as_int() not in (-1, _RANK - 1):
            raise Refused(f"its softmax runs over axis {axis.as_int()}", match.softmax)
        if used_by(match.probabilities, "MatMul") is None:
            raise Refused("its probabilities are read by another node as well", match.probabilities)
        if match.scores is None:
            raise Refused("its scores are not one product of two matrices", match.softmax.inputs[0])
        if match.scores.key is None:
            raise Refused("its keys are not seen to be transposed", match.scores.transposed)
        if len(match.scores.key.perm) != _RANK:
            rank = len(match.scores.key.perm)
            raise Refused(f"its keys have rank {rank}, attention is written for {_RANK}", match.scores.transposed)
        if match.scores.masks and _type_of(match.scores) is None:
            raise Refused("the type of its mask is not known", match.scores.masks[0])
        # No CPU runtime broadcasts a mask along the keys.
        if match.scores.masks and all(map(_is_narrow, match.scores.masks)):
            raise Refused("its mask is one number for all keys", match.scores.masks[0])
        for name, value in (("queries", match.scores.query), ("values", match.product.inputs[1])):
            if rank_of(value) not in (None, _RANK):
                raise Refused(f"its {name} have rank {rank_of(value)}, attention is written for {_RANK}", value)
        if rank_of(match.product.outputs[0]) not in (None, _RANK):
            raise Refused("its mask or its scale adds axes to its scores", match.product.outputs[0])
        _check_spread(match, match.scores.query, match.scores.key)

    def rewrite(self, match: Attention) -> tuple[ir.Value, list[ir.Node]]:
        """Build keys in the operator's layout, one mask with a row per query, and one node."""
        if match.scores is None or match.scores.key is None:
            raise ValueError("rewrite needs a match that was checked")
        key, nodes = _keys(match.scores.key)
        inputs: list[ir.Value | None] = [match.scores.query, key, match.product.inputs[1]]
        if match.scores.masks:
            mask, adding = _sum(match.scores)
            mask, saying = _as_written(mask, mask_values(mask), match.guarded)
            mask, spreading = rows_for(match.scores.query, mask)
            inputs.append(mask)
            nodes += [*adding, *saying, *spreading]
        attributes = {"scale": match.scores.scale} | ({"softcap": match.scores.softcap} if match.scores.softcap else {})
        return match.product.outputs[0], [*nodes, ir.node("Attention", inputs, attributes)]


def _check_spread(match: Attention, query: ir.Value, key: Turned) -> None:
    """Raise Refused if batch or heads of one operand are broadcast: a MatMul does so, Attention does not.

    One head of keys and values may serve all queries.
    """
    keys = dims_of(key.source.shape)
    shapes = [
        dims_of(query.shape),
        [keys[axis] for axis in key.perm] if len(keys) == len(key.perm) else [],
        dims_of(None if match.product.inputs[1] is None else match.product.inputs[1].shape),
        dims_of(match.softmax.outputs[0].shape),
    ]
    for axis, what in enumerate(("texts", "heads")):
        sizes = [shape[axis] if len(shape) == _RANK else None for shape in shapes]
        # Multi-query attention: the operator itself shares one head among all queries.
        if what == "heads" and sizes[1] == sizes[2] == 1:
            sizes = [sizes[0], sizes[3]]
        distinct = {size for size in sizes if size is not None}
        if len(distinct) > 1 and (1 in distinct or len({size for size in distinct if isinstance(size, int)}) > 1):
            raise Refused(f"its {what} are repeated along axis {axis}", match.softmax)


def _guarded(probabilities: ir.Value) -> ir.Value:
    """The value after the guard `Where(IsNaN(p), 0, p)`, or p itself."""
    for user in [use.node for use in probabilities.uses()]:
        test = used_by(user.outputs[0], "Where") if user.op_type == "IsNaN" else None
        if test is not None and test.inputs[2] is probabilities and scalar_of(test.inputs[1]) == 0.0:
            return test.outputs[0]
    return probabilities


def _flattened(probabilities: ir.Value) -> bool:
    """True if batch and heads are merged into one axis before the MatMul with the values."""
    reshape = used_by(probabilities, "Reshape")
    return reshape is not None and used_by(reshape.outputs[0], "MatMul") is not None


def _scores(value: ir.Value) -> Scores | None:
    """Queries, keys, scale and masks of the argument of a softmax; None for other sums."""
    terms = _terms(value)
    products = [term for term in terms if producer_of(_uncapped(term)[0].value, "MatMul") is not None]
    scaled, softcap = _uncapped(products[0]) if len(products) == 1 else (None, 0.0)
    matmul = None if scaled is None else producer_of(scaled.value, "MatMul")
    if scaled is None or matmul is None or matmul.inputs[0] is None or matmul.inputs[1] is None:
        return None
    query, turned = _unscaled(matmul.inputs[0]), _unscaled(matmul.inputs[1])
    masks = tuple(term for term in terms if term is not products[0])
    scale = scaled.factor * query.factor * turned.factor
    return Scores(query.value, _turned_key(turned.value), turned.value, scale, softcap, masks)


def _is_narrow(mask: ir.Value) -> bool:
    """True if a mask is broadcast along the keys, which runtimes do not support (an unknown shape may not be)."""
    return mask.shape is not None and (len(mask.shape) == 0 or mask.shape[-1] == 1)


def _type_of(scores: Scores) -> ir.DataType | None:
    """The type of the masks, equal to that of the queries."""
    types = (value.dtype for value in (*scores.masks, scores.query, scores.transposed))
    return next((dtype for dtype in types if dtype is not None), None)


def _sum(scores: Scores) -> tuple[ir.Value, list[ir.Node]]:
    """One mask, and the additions that combine several (a relative bias and a padding mask, for example)."""
    total, nodes = scores.masks[0], []
    dtype = _type_of(scores)
    for mask in scores.masks[1:]:
        nodes.append(ir.node("Add", [total, mask]))
        total = nodes[-1].outputs[0]
    if total.type is None and dtype is not None:
        total.type = ir.TensorType(dtype)
    return total, nodes


def _as_written(mask: ir.Value, held: MaskValues, guarded: bool) -> tuple[ir.Value, list[ir.Node]]:
    """The mask with which Attention equals the softmax for fully masked rows (see `_mask_values`).

    The lowest number becomes the next one, and an unguarded row of minus infinity becomes NaN.
    """
    if mask.dtype is None:
        raise ValueError("rewrite needs a match that was checked")
    tape = ir.tape.Tape()
    written = mask
    holds_lowest = held.low <= lowest(mask.dtype)
    hidden = tape.op("IsInf", [mask], {"detect_positive": 0}) if held.hides and (holds_lowest or not guarded) else None
    if holds_lowest:
        raised = tape.op("Max", [mask, above_lowest(tape, mask.dtype)])
        written = raised if hidden is None else tape.op("Where", [hidden, mask, raised])
    if hidden is not None and not guarded:
        last = tape.op("Constant", [], {"value": ir.tensor(np.array([-1], np.int64))})
        flags = tape.op("Cast", [hidden], {"to": ir.DataType.FLOAT})
        nothing = tape.op("Cast", [tape.op("ReduceMin", [flags, last], {"keepdims": 1})], {"to": ir.DataType.BOOL})
        written = tape.op("Where", [nothing, number(tape, float("nan"), mask.dtype), written])
    written.shape, written.type = mask.shape, mask.type
    return written, list(tape.nodes)


def _terms(value: ir.Value) -> list[ir.Value]:
    """The terms of a sum of any nesting; a product with a number is one term."""
    add = producer_of(value, "Add")
    operands = [] if add is None else [operand for operand in add.inputs if operand is not None]
    return [term for operand in operands for term in _terms(operand)] if operands else [value]


def _unscaled(value: ir.Value) -> ScaledValue:
    """Remove factors and divisors that are numbers from a value with no other readers."""
    factor = 1.0
    while (node := producer_of(value, "Mul", "Div")) is not None:
        left, right = node.inputs[0], node.inputs[1]
        number = scalar_of(right)
        if number is not None and left is not None:
            value, factor = left, factor * (number if node.op_type == "Mul" else 1 / number)
        elif node.op_type == "Mul" and (number := scalar_of(left)) is not None and right is not None:
            value, factor = right, factor * number
        else:
            break
    return ScaledValue(value, factor)


def _uncapped(value: ir.Value) -> tuple[ScaledValue, float]:
    """The source x · scale of cap · tanh(x · scale / cap), and the cap; without a cap the value itself, and 0."""
    outer = _unscaled(value)
    tangent = producer_of(outer.value, "Tanh")
    if tangent is None or tangent.inputs[0] is None:
        return outer, 0.0
    inner = _unscaled(tangent.inputs[0])
    return ScaledValue(inner.value, inner.factor * outer.factor), outer.factor


def _turned_key(value: ir.Value) -> Turned | None:
    """The source of a transposed value: by one Transpose, or flattened to rank three, transposed and reshaped."""
    transpose = producer_of(value, "Transpose")
    if transpose is not None:
        perm = transpose.attributes.get("perm")
        order = list(perm.as_ints()) if perm is not None else []
        if transpose.inputs[0] is None or len(order) < 2:
            return None
        order[-1], order[-2] = order[-2], order[-1]
        return Turned(transpose.inputs[0], tuple(order))
    outer = producer_of(value, "Reshape")
    middle = producer_of(None if outer is None else outer.inputs[0], "Transpose")
    inner = producer_of(None if middle is None else middle.inputs[0], "Reshape")
    source = None if inner is None else inner.inputs[0]
    if outer is None or middle is None or inner is None or source is None or outer.graph is None:
        return None
    ints = PropagatedInts.through(outer.graph)
    dims, flat, back = dims_of(source.shape), ints.entries(inner.inputs[1]), ints.entries(outer.inputs[1])
    swaps = middle.attributes.get("perm")
    # torch.bmm flattens batch and heads first; the reshapes must restore exactly these axes.
    plain = swaps is not None and list(swaps.as_ints()) == [0, 2, 1] and None not in dims and len(dims) == _RANK
    if plain and flat == [-1, *dims[2:]] and back == [*dims[:2], dims[3], dims[2]]:
        return Turned(source, tuple(range(_RANK)))
    return None


def _keys(turned: Turned) -> tuple[ir.Value, list[ir.Node]]:
    """Keys as (batch, heads, keys, size)."""
    if turned.perm == tuple(range(_RANK)):
        return turned.source, []
    transpose = ir.node("Transpose", [turned.source], {"perm": list(turned.perm)})
    return transpose.outputs[0], [transpose]
