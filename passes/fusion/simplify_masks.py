"""Read a mask directly, where a graph gathers it entry by entry in order.

Before:  b = Range (0, batch, 1);  k = Range (0, keys, 1);  …;  i = Expand (b4, s);  j = Expand (k4, s)
         n = Concat <axis=-1> (i5, j5);  m = GatherND (mask, n)                       mask: [batch,keys]
After:   m = Unsqueeze (mask, {1, 2})                                                 m: [batch,1,1,keys]

`torch.vmap` over batch, heads, queries and keys exports this form for masks that are functions of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import Refused, RewritePass
from planish.optimizer.ir.graph import constant_of, producer_of, rank_of, scalar_of

_PASSED_ON = ("Identity", "Cast", "Expand")


@dataclass(frozen=True)
class Walk:
    """A match: the gathered value, the GatherND, and the axis of the result for each of the value's axes."""

    data: ir.Value
    gather: ir.Node
    axes: tuple[int, ...]


@dataclass(frozen=True)
class SimplifyMasks(RewritePass[Walk]):
    """Replace a GatherND whose indices count along axes of their own, from zero to the end, by an Unsqueeze.

    1. What counts: a ``Range`` from zero in steps of one; it may get axes, a type and other axes to be spread over.
    2. Needed: an index for each axis of what is gathered, as long as that axis, in the order of the axes.
    """

    name: ClassVar[str] = "simplify-masks"
    root: ClassVar[str] = "GatherND"
    since: ClassVar[int] = 13

    def pattern(self, node: ir.Node) -> Walk | None:
        """Match joined indices, each of which must count along an axis."""
        joined, data = producer_of(node.inputs[1], "Concat"), node.inputs[0]
        rank, within = rank_of(data), node.attributes.get("batch_dims")
        # One index per axis of the data: fewer would gather slices.
        if joined is None or data is None or len(joined.inputs) != rank or (within is not None and within.as_int()):
            return None
        axes = [_counted(part) for part in joined.inputs]
        counted = [axis for axis in axes if axis is not None]
        return Walk(data, node, tuple(counted)) if len(counted) == len(axes) else None

    def check(self, match: Walk) -> None:
        """Check that all entries are taken in order, once."""
        data, result = match.data.shape, match.gather.outputs[0].shape
        if data is None or result is None:
            raise Refused("the shape of what it gathers is not known", match.gather.inputs[0])
        # Another order is a transposition, which Unsqueeze cannot express.
        if list(match.axes) != sorted(set(match.axes)):
            raise Refused("its indices run along the axes in another order", match.gather.inputs[1])
        for dim, axis in zip(data, match.axes, strict=True):
            if not _same(dim, result[axis]):
                raise Refused(f"it takes {result[axis]} of {dim} entries", match.gather.inputs[1])
        rest = [dim for axis, dim in enumerate(result) if axis not in match.axes]
        if any(dim != 1 for dim in rest):
            raise Refused("it repeats entries", match.gather.outputs[0])

    def rewrite(self, match: Walk) -> tuple[ir.Value, list[ir.Node]]:
        """Build axes of size 1 where the result has more axes than the value."""
        result = match.gather.outputs[0]
        others = [axis for axis in range(rank_of(result) or 0) if axis not in match.axes]
        axes = ir.node("Constant", [], {"value": ir.tensor(np.array(others, np.int64))})
        return result, [axes, ir.node("Unsqueeze", [match.data, axes.outputs[0]])]


def _counted(value: ir.Value | None) -> int | None:
    """The axis along which a value is 0, 1, 2, …; None if there is none."""
    if value is None or value.dtype is None or not value.dtype.is_integer():
        return None
    node = producer_of(value, "Range", "Unsqueeze", *_PASSED_ON)
    if node is None or node.op_type == "Range":
        start, step = (None, None) if node is None else (scalar_of(node.inputs[0]), scalar_of(node.inputs[2]))
        return 0 if (start, step) == (0, 1) else None
    source, rank = node.inputs[0], rank_of(value)
    axis, before = _counted(source), rank_of(source)
    if source is None or axis is None or rank is None or before is None:
        return None
    if node.op_type == "Unsqueeze":
        return _moved(axis, constant_of(node.inputs[1]), rank)
    if value.shape is None or source.shape is None:
        return None
    spread = axis + rank - before
    return spread if _same(value.shape[spread], source.shape[axis]) else None


def _moved(axis: int, added: np.ndarray | None, rank: int) -> int | None:
    """The index of an axis after the addition of other axes."""
    if added is None:
        return None
    new = {int(one) % rank for one in added.reshape(-1)}
    return [place for place in range(rank) if place not in new][axis]


def _same(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """True if two dimensions are the same number or have the same name."""
    return one == other and (isinstance(one, int) or one.value is not None)
