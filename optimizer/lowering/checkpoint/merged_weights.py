"""Parameters that transformers puts together from several stored tensors, as references.

The files hold one tensor for each expert where the module has one parameter for all; other files hold one tensor for
queries, keys and values where the module has three. Which becomes which, the converters of transformers say, as
operations on loaded tensors. Here they run on stand-ins that have a shape and no data: what comes out tells where each
piece of a parameter is stored. Stand-ins know how tensors are stacked, concatenated, cut and transposed; a converter
that asks for anything else is applied to the tensors themselves when its parameter is read (`conversion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from planish.optimizer.lowering.checkpoint.converted_weights import Part, apply, convert
from planish.optimizer.lowering.checkpoint.weights import Box, Weight, boxes, numpy_type


@dataclass(frozen=True)
class Piece:
    """A part of a stored tensor, and where it lies in the parameter."""

    source: Weight
    window: tuple[tuple[int, int], ...]
    """Begin and end of the part on each axis of the stored tensor."""
    axes: tuple[int | None, ...]
    """For each axis of the parameter, the axis of the stored tensor that it is; None where the piece is one deep."""
    start: tuple[int, ...]
    """Where the piece begins on each axis of the parameter."""

    @property
    def extent(self) -> tuple[int, ...]:
        """Its size on each axis of the parameter."""
        return tuple(1 if axis is None else self.window[axis][1] - self.window[axis][0] for axis in self.axes)

    def narrowed(self, axis: int, begin: int, end: int) -> Piece | None:
        """What of it lies between two places on an axis, counted from the first of them; None if nothing does."""
        offset, length = self.start[axis], self.extent[axis]
        first, last = max(begin - offset, 0), min(end - offset, length)
        if first >= last:
            return None
        place = (*self.start[:axis], max(offset - begin, 0), *self.start[axis + 1 :])
        inner = self.axes[axis]
        if inner is None:
            return replace(self, start=place)
        low = self.window[inner][0]
        window = (*self.window[:inner], (low + first, low + last), *self.window[inner + 1 :])
        return replace(self, window=window, start=place)

    def mapped(self) -> np.ndarray:
        """Its values as they are stored, shape `extent`: a view of the file."""
        part = self.source.mapped()[tuple(slice(begin, end) for begin, end in self.window)]
        turned = part.transpose([axis for axis in self.axes if axis is not None])
        return turned[tuple(None if axis is None else slice(None) for axis in self.axes)]


@dataclass(frozen=True)
class Assembled(Weight):
    """A parameter whose pieces are stored apart."""

    whole: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.whole

    def read(self) -> np.ndarray:
        """Its values in an array of its own; at no time is there more than that array and one strip."""
        found = np.empty(self.shape, numpy_type(self.dtype))
        self.read_into(found)
        return found

    def read_into(self, found: np.ndarray) -> None:
        """Write its values into an array, piece by piece and strip by strip."""
        turned = found.transpose(np.argsort(self.order))
        for piece in self.pieces:
            array = piece.mapped()
            target = turned[tuple(slice(a, a + size) for a, size in zip(piece.start, array.shape, strict=True))]
            for box in boxes(array.shape):
                target[box] = array[box]

    def strips(self) -> Iterator[np.ndarray]:
        """Its values piece by piece, each read from where it is stored."""
        turned = _permuted(self, self.order)
        for box in boxes(turned.whole):
            yield _narrowed_to(turned, box).read()


def _narrowed_to(weight: Assembled, box: Box) -> Assembled:
    for axis, part in enumerate(box):
        weight = _narrow(weight, axis, part.start, part.stop)
    return weight


def _narrow(weight: Assembled, axis: int, begin: int, end: int) -> Assembled:
    pieces = [piece.narrowed(axis, begin, end) for piece in weight.pieces]
    whole = (*weight.whole[:axis], end - begin, *weight.whole[axis + 1 :])
    return replace(weight, whole=whole, pieces=tuple(piece for piece in pieces if piece is not None))


def _permuted(weight: Assembled, order: Sequence[int]) -> Assembled:
    def turned(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(items[axis] for axis in order)

    pieces = [replace(piece, axes=turned(piece.axes), start=turned(piece.start)) for piece in weight.pieces]
    return replace(weight, whole=turned(weight.whole), pieces=tuple(pieces), permutation=None)


class NotFollowedError(Exception):
    """A converter asks for more of its tensors than where they are stored."""


class StandIn:
    """A tensor without data, as far as the operations of converters look at one."""

    def __init__(self, weight: Assembled) -> None:
        self.weight = weight
        self.shape = weight.whole

    def contiguous(self) -> StandIn:
        """Itself: the order of memory is decided when it is read."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotFollowedError(name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        follow = _FOLLOWED.get(function.__name__)
        if follow is None:
            raise NotFollowedError(function.__name__)
        return follow(*args, **(kwargs or {}))


def _stack(tensors: Sequence[StandIn], dim: int = 0) -> StandIn:
    """`torch.stack`"""
    return _cat([StandIn(_deepened(tensor.weight, dim)) for tensor in tensors], dim)


def _deepened(weight: Assembled, axis: int) -> Assembled:
    axis = range(len(weight.whole) + 1)[axis]
    pieces = [
        replace(
            piece,
            axes=(*piece.axes[:axis], None, *piece.axes[axis:]),
            start=(*piece.start[:axis], 0, *piece.start[axis:]),
        )
        for piece in weight.pieces
    ]
    return replace(weight, whole=(*weight.whole[:axis], 1, *weight.whole[axis:]), pieces=tuple(pieces))


def _cat(tensors: Sequence[StandIn], dim: int = 0) -> StandIn:
    """`torch.cat`"""
    weights = [tensor.weight for tensor in tensors]
    first = weights[0]
    axis = range(len(first.whole))[dim]
    rest = {(*weight.whole[:axis], 0, *weight.whole[axis + 1 :]) for weight in weights}
    if len(rest) > 1 or len({weight.dtype for weight in weights}) > 1:
        raise NotFollowedError("unequal pieces")
    offsets = [0, *accumulate(weight.whole[axis] for weight in weights)]
    pieces = [
        replace(piece, start=(*piece.start[:axis], piece.start[axis] + offset, *piece.start[axis + 1 :]))
        for weight, offset in zip(weights, offsets[:-1], strict=True)
        for piece in weight.pieces
    ]
    whole = (*first.whole[:axis], offsets[-1], *first.whole[axis + 1 :])
    return StandIn(replace(first, whole=whole, pieces=tuple(pieces)))


def _transpose(tensor: StandIn, dim0: int, dim1: int) -> StandIn:
    """`torch.transpose`"""
    order = list(range(len(tensor.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return StandIn(_permuted(tensor.weight, order))


def _chunk(tensor: StandIn, chunks: int, dim: int = 0) -> tuple[StandIn, ...]:
    """`torch.chunk`: as many parts as asked for where the size allows, the last perhaps smaller"""
    size = tensor.shape[dim]
    step = -(-size // chunks)
    return _split(tensor, [min(step, size - begin) for begin in range(0, size, step)], dim)


def _split(tensor: StandIn, sizes: Sequence[int], dim: int = 0) -> tuple[StandIn, ...]:
    """`torch.split` into parts of these sizes"""
    axis = range(len(tensor.shape))[dim]
    ends = list(accumulate(sizes))
    if ends[-1] != tensor.shape[axis]:
        raise NotFollowedError("sizes that do not fit")
    return tuple(StandIn(_narrow(tensor.weight, axis, end - size, end)) for size, end in zip(sizes, ends, strict=True))


_FOLLOWED: Mapping[str, Callable[..., Any]] = {
    "stack": _stack, "cat": _cat, "transpose": _transpose, "chunk": _chunk, "split": _split,
}  # fmt: skip
"""Functions of torch by name."""


@dataclass
class Assembly:
    """Stored tensors on their way through the converters of transformers."""

    converters: Sequence[Any]
    model: Any
    collected: dict[str, list[Part]] = field(default_factory=dict)
    """What is stored for the first parameter that a converter makes, in the natural order of names."""

    def add(self, target: str, key: str, pattern: str, tensor: Weight) -> None:
        """Hand over a stored tensor, in the natural order of names, for the converter that has this pattern."""
        self.collected.setdefault(target, []).append((pattern, key, tensor))

    def finish(self) -> dict[str, Weight]:
        """The parameters that were put together, by name."""
        rules = {source: rule for rule in self.converters for source in rule.source_patterns}
        found: dict[str, Weight] = {}
        for target, parts in self.collected.items():
            rule = rules[parts[0][0]]
            stand_ins = [(pattern, key, StandIn(_whole(tensor))) for pattern, key, tensor in parts]
            try:
                made = apply(rule, self.model, target, stand_ins)
                found |= {name: stand_in.weight for name, stand_in in made.items()}
            except (NotFollowedError, TypeError):  # arithmetic on a stand-in is a TypeError
                found |= convert(rule, self.model, target, parts)
        return found


def _whole(tensor: Weight) -> Assembled:
    window, axes = tuple((0, size) for size in tensor.shape), tuple(range(len(tensor.shape)))
    return Assembled(tensor.shape, (Piece(tensor, window, axes, (0,) * len(axes)),), dtype=tensor.dtype)
