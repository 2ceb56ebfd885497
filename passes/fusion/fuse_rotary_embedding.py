"""Raise rotary position embeddings to the standard's operator.

Before:  f = Concat <axis=-1> (a, a);  c = Unsqueeze (Cos (f), 1);  s = Unsqueeze (Sin (f), 1)
         l = Slice (x, 0, 4, 3);  h = Slice (x, 4, MAX, 3);  t = Concat <axis=-1> (Neg (h), l)
         r = Add (Mul (x, c), Mul (t, s))
After:   r = RotaryEmbedding (x, Slice (Cos (f), 0, 4, -1), Slice (Sin (f), 0, 4, -1))

Su et al. 2021, "RoFormer", equation 34. Halves are rotated (GPT-NeoX, Llama) or pairs (GPT-J, interleaved), of all
features or of the first ones only. ONNX: RotaryEmbedding, opset 23; it takes each angle once, so the two halves of
cos and sin must be seen to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import NearMiss, Refused, RewritePass
from planish.optimizer.ir.graph import constant_of, producer_of, rank_of
from planish.passes.fusion._match import other_operand, slice_of, used_by, with_constant

_HEADS = {1: False, 2: True}
"""Axis on which angles get the heads axis -> True if heads follow the sequence."""


@dataclass(frozen=True)
class Angles:
    """Cosines or sines: (batch, sequence, angles), the added heads axis, and the form of their duplication."""

    value: ir.Value
    axis: int | None
    doubled: bool
    """True if each angle is in both halves of the last axis; False if it is there once (pairs)."""


@dataclass(frozen=True)
class Rotary:
    """A match: the rotated value, its angles, and the final value."""

    x: ir.Value
    cos: Angles | None
    sin: Angles | None
    half: int
    """Number of angles of one head."""
    interleaved: bool
    rest: ir.Value | None
    """The features that are not rotated, concatenated afterwards; None if all are rotated."""
    source: ir.Value
    """The source of `x` and `rest`, or `x`."""
    result: ir.Value


@dataclass(frozen=True)
class FuseRotaryEmbedding(RewritePass[Rotary]):
    """Fuse x · cos + rotated(x) · sin: complete or partial, halves or pairs."""

    name: ClassVar[str] = "fuse-rotary-embedding"
    root: ClassVar[str] = "Add"
    since: ClassVar[int] = 23

    def pattern(self, node: ir.Node) -> Rotary | None:
        """Match a sum of two products, in which one factor is the rotated form of another."""
        left, right = (producer_of(value, "Mul") for value in node.inputs)
        # Operands of Add and Mul may be in either order.
        for plain, turned in ((left, right), (right, left)):
            for rotated in () if plain is None or turned is None else turned.inputs:
                rotation = _rotated(rotated)
                if rotation is None or plain is None or turned is None or rotated is None:
                    continue
                x, half, interleaved = rotation
                cos, sin = other_operand(plain, x), other_operand(turned, rotated)
                if cos is None or sin is None:
                    raise NearMiss("what is rotated is not what is multiplied beside it", x)
                rest, source, result = _partial(x, node.outputs[0], 2 * half)
                angles = [_angles(value, interleaved) for value in (cos, sin)]
                return Rotary(x, angles[0], angles[1], half, interleaved, rest, source, result)
        return None

    def check(self, match: Rotary) -> None:
        """Check for equal halves of angles, one heads axis, and one row of angles per text."""
        if match.x.shape is None or len(match.x.shape) != 4 or match.x.shape[-1] != 2 * match.half:
            raise Refused(f"what is rotated is not of four dimensions, the last {2 * match.half}", match.x)
        if match.cos is None or match.sin is None:
            raise Refused("its angles are not seen to be made of equal halves", match.result)
        if match.cos.axis != match.sin.axis or match.cos.axis not in _HEADS:
            raise Refused(f"its angles are not repeated over the heads, but along axis {match.cos.axis}", match.x)
        if rank_of(match.cos.value) != 3 or rank_of(match.sin.value) != 3:
            raise Refused("its angles are not of three dimensions", match.cos.value)
        sequence = match.x.shape[1 if _HEADS[match.cos.axis] else 2]
        for angles in (match.cos.value, match.sin.value):
            texts, tokens = (None, None) if angles.shape is None else angles.shape[:2]
            # The operator requires one row of angles per token and broadcasts neither axis.
            if (tokens == 1 and sequence != 1) or (match.x.shape[0] == 1 and texts is not None and texts != 1):
                raise Refused("its angles are repeated along the tokens, or what is rotated along the texts", angles)

    def rewrite(self, match: Rotary) -> tuple[ir.Value, list[ir.Node]]:
        """Build one node with each angle once, one row per text, and heads before the sequence."""
        if match.cos is None or match.sin is None:
            raise ValueError("rewrite needs a match that was checked")
        nodes: list[ir.Node] = []
        cos, sin = (_rows(match.source, _once(angles, match.half, nodes), nodes) for angles in (match.cos, match.sin))
        dim = 0 if match.rest is None else 2 * match.half
        attributes = {"interleaved": int(match.interleaved), "rotary_embedding_dim": dim}
        behind = _HEADS[match.cos.axis or 0]
        source = _swapped(match.source, nodes) if behind else match.source
        nodes.append(ir.node("RotaryEmbedding", [source, cos, sin], attributes))
        if behind:
            _swapped(nodes[-1].outputs[0], nodes)
        return match.result, nodes


def _rotated(value: ir.Value | None) -> tuple[ir.Value, int, bool] | None:
    """x of (-second, first), the number of angles, and True for pairs instead of halves."""
    halves = producer_of(value, "Concat")
    if halves is not None:
        return _rotated_halves(halves)
    joined = producer_of(value, "Reshape")
    pairs = producer_of(None if joined is None else joined.inputs[0], "Concat")
    return None if pairs is None else _rotated_pairs(pairs)


def _rotated_halves(concat: ir.Node) -> tuple[ir.Value, int, bool] | None:
    negated = producer_of(concat.inputs[0], "Neg")
    if negated is None or len(concat.inputs) != 2 or not _is_last(concat.attributes["axis"].as_int(), concat):
        return None
    second, first = slice_of(negated.inputs[0]), slice_of(concat.inputs[1])
    if second is None or first is None or first.source is not second.source or not first.along_last(second):
        return None
    fits = first.start == 0 and first.end == second.start and second.reaches(2 * first.end) and first.step == 1
    return (first.source, first.end, False) if fits and second.step == 1 else None


def _rotated_pairs(concat: ir.Node) -> tuple[ir.Value, int, bool] | None:
    """x of (-odd, even), each with an additional last axis."""
    if len(concat.inputs) != 2 or not _is_last(concat.attributes["axis"].as_int(), concat):
        return None
    raised = [producer_of(value, "Unsqueeze") for value in concat.inputs]
    negated = producer_of(None if raised[0] is None else raised[0].inputs[0], "Neg")
    odd = slice_of(None if negated is None else negated.inputs[0])
    even = slice_of(None if raised[1] is None else raised[1].inputs[0])
    if odd is None or even is None or odd.source is not even.source or not even.along_last(odd):
        return None
    size = None if even.source.shape is None else even.source.shape[-1]
    fits = (even.start, odd.start, even.step, odd.step) == (0, 1, 2, 2) and isinstance(size, int)
    whole = isinstance(size, int) and even.reaches(size) and odd.reaches(size) and size % 2 == 0
    return (even.source, size // 2, True) if fits and whole and isinstance(size, int) else None


def _is_last(axis: int, node: ir.Node) -> bool:
    return axis == -1 or axis == (rank_of(node.outputs[0]) or 0) - 1


def _partial(x: ir.Value, rotated: ir.Value, size: int) -> tuple[ir.Value | None, ir.Value, ir.Value]:
    """The features after the rotated ones, the source of both, and the value that concatenates them."""
    concat = used_by(rotated, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not rotated:
        return None, x, rotated
    first, rest = slice_of(x), slice_of(concat.inputs[1])
    if first is None or rest is None or first.source is not rest.source or not first.along_last(rest):
        return None, x, rotated
    width = None if first.source.shape is None else first.source.shape[-1]
    cut = (first.start, first.end, first.step, rest.start, rest.step) == (0, size, 1, size, 1)
    joins = _is_last(concat.attributes["axis"].as_int(), concat)
    if not cut or not joins or not isinstance(width, int) or not rest.reaches(width):
        return None, x, rotated
    return concat.inputs[1], first.source, concat.outputs[0]


def _angles(value: ir.Value, interleaved: bool) -> Angles | None:
    """Cosines or sines without the heads axis; None if no duplication is found."""
    if interleaved:
        return _repeated(value)
    raised = producer_of(value, "Unsqueeze")
    axes = None if raised is None else constant_of(raised.inputs[1])
    source = value if raised is None else raised.inputs[0]
    if source is None or not _mirrored(source):
        return None
    return Angles(source, None if axes is None or axes.size != 1 else int(axes.reshape(())), True)


def _mirrored(value: ir.Value | None) -> bool:
    """True if both halves of the last axis are equal, traced back to their Concat."""
    node = producer_of(value, "Cos", "Sin", "Cast", "Identity", "Mul", "Concat", "Gather")
    if node is None:
        array = constant_of(value, limit=1 << 24)
        return array is not None and array.ndim > 0 and array.shape[-1] % 2 == 0 and _equal_halves(array)
    match node.op_type:
        case "Concat":
            last = _is_last(node.attributes["axis"].as_int(), node)
            return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        case "Mul":
            return any(_mirrored(other) for other, _ in with_constant(node))
        case "Gather":
            axis = node.attributes.get("axis")
            return (
                (axis is None or axis.as_int() == 0)
                and (rank_of(node.inputs[0]) or 0) > 1
                and _mirrored(node.inputs[0])
            )
    return _mirrored(node.inputs[0])


def _equal_halves(array: np.ndarray) -> bool:
    left, right = np.split(array, 2, axis=-1)
    return bool(np.array_equal(left, right))


def _repeated(value: ir.Value) -> Angles | None:
    """The source of angles that were repeated in pairs: an additional last axis, expanded, and flattened."""
    joined = producer_of(value, "Reshape")
    paired = producer_of(None if joined is None else joined.inputs[0], "Expand", "Tile")
    raised = producer_of(None if paired is None else paired.inputs[0], "Unsqueeze")
    before, between, after = (None if node is None else node.outputs[0].shape for node in (raised, paired, joined))
    if raised is None or before is None or between is None or after is None or len(before) != len(after) + 1:
        return None
    once = before[-2]
    # Repetition in place: (a) -> (a, 1) -> (a, 2) -> (2a).
    doubles = isinstance(once, int) and after[-1] == 2 * once and (before[-1], between[-1]) == (1, 2)
    source, axes = _raised_along(raised)
    inner = [axis for axis in axes if axis not in (-1, len(after))]
    return Angles(source, inner[0] if len(inner) == 1 else None, False) if doubles and source is not None else None


def _raised_along(node: ir.Node) -> tuple[ir.Value | None, list[int]]:
    """The source of one or two Unsqueezes, and the axes that they add."""
    axes = constant_of(node.inputs[1])
    added = [] if axes is None else [int(axis) for axis in axes.reshape(-1)]
    inner = producer_of(node.inputs[0], "Unsqueeze") if len(added) == 1 else None
    if inner is None:
        return node.inputs[0], added
    more = constant_of(inner.inputs[1])
    return inner.inputs[0], [*([] if more is None else [int(axis) for axis in more.reshape(-1)]), *added]


def _once(angles: Angles, half: int, nodes: list[ir.Node]) -> ir.Value:
    """Take each angle once."""
    if not angles.doubled:
        return angles.value
    bounds = [_integers(nodes, [number]) for number in (0, half, -1)]
    nodes.append(ir.node("Slice", [angles.value, *bounds]))
    output, dims = nodes[-1].outputs[0], angles.value.shape or ir.Shape(())
    output.type, output.shape = angles.value.type, ir.Shape([*dims[:2], half])
    return output


def _rows(x: ir.Value, angles: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """Expand angles to a row per text, for positions that all texts share."""
    # RotaryEmbedding does not broadcast cos and sin over the batch.
    if x.shape is not None and angles.shape is not None and x.shape[0] == angles.shape[0]:
        return angles
    batch = ir.node("Shape", [x], {"start": 0, "end": 1})
    target = ir.node("Concat", [batch.outputs[0], _integers(nodes, [1, 1])], {"axis": 0})
    nodes += [batch, target, ir.node("Expand", [angles, target.outputs[0]])]
    return nodes[-1].outputs[0]


def _swapped(x: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """Swap heads and sequence."""
    nodes.append(ir.node("Transpose", [x], {"perm": [0, 2, 1, 3]}))
    return nodes[-1].outputs[0]


def _integers(nodes: list[ir.Node], numbers: Sequence[int]) -> ir.Value:
    nodes.append(ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))}))
    return nodes[-1].outputs[0]
