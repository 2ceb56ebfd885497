"""Parameters that transformers assembles from several stored tensors, as references.

Files may hold one tensor per expert where the module has one parameter for all, or one tensor for queries, keys and
values where the module has three. The converters of transformers define the mapping as operations on loaded tensors.
Here they run on placeholders that have a shape and no data, which record the storage of each piece of a parameter.
Placeholders support stack, concatenation, slicing and transposition. A converter with other operations runs on the
tensors themselves when its parameter is read (`converted_weights`).
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
    """A part of a stored tensor, and its position in the parameter."""

    source: Weight
    window: tuple[tuple[int, int], ...]
    """Start and end of the part on each axis of the stored tensor."""
    axes: tuple[int | None, ...]
    """The stored axis of each axis of the parameter; None where the piece has size 1."""
    start: tuple[int, ...]
    """Start of the piece on each axis of the parameter."""

    @property
    def extent(self) -> tuple[int, ...]:
        """Its size on each axis of the parameter."""
        return tuple(1 if axis is None else self.window[axis][1] - self.window[axis][0] for axis in self.axes)

    def narrowed(self, axis: int, begin: int, end: int) -> Piece | None:
        """The intersection with an interval of an axis, relative to the start of that interval; None if it is empty."""
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
        """Its values as stored, of shape `extent`: a view of the file."""
        part = self.source.mapped()[tuple(slice(begin, end) for begin, end in self.window)]
        turned = part.transpose([axis for axis in self.axes if axis is not None])
        return turned[tuple(None if axis is None else slice(None) for axis in self.axes)]


@dataclass(frozen=True)
class Assembled(Weight):
    """A parameter that is assembled from pieces."""

    whole: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.whole

    def read(self) -> np.ndarray:
        """Its values in a new array; memory is that array and one strip."""
        array = np.empty(self.shape, numpy_type(self.dtype))
        self.read_into(array)
        return array

    def read_into(self, array: np.ndarray) -> None:
        """Write its values into an array, piece by piece and strip by strip."""
        # A view in stored order, so that strips are copied contiguously from the file.
        turned = array.transpose(np.argsort(self.order))
        for piece in self.pieces:
            stored = piece.mapped()
            target = turned[tuple(slice(a, a + size) for a, size in zip(piece.start, stored.shape, strict=True))]
            for box in boxes(stored.shape):
                target[box] = stored[box]

    def strips(self) -> Iterator[np.ndarray]:
        """Its values piece by piece, each read from its place."""
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
    """Raised for converter operations that placeholders do not support."""


class Placeholder:
    """A tensor without data that supports the operations of converters."""

    def __init__(self, weight: Assembled) -> None:
        self.weight = weight
        self.shape = weight.whole

    def contiguous(self) -> Placeholder:
        """The placeholder itself: memory order is decided when the weight is read."""
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


def _stack(tensors: Sequence[Placeholder], dim: int = 0) -> Placeholder:
    """`torch.stack`"""
    return _cat([Placeholder(_deepened(tensor.weight, dim)) for tensor in tensors], dim)


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


def _cat(tensors: Sequence[Placeholder], dim: int = 0) -> Placeholder:
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
    return Placeholder(replace(first, whole=whole, pieces=tuple(pieces)))


def _transpose(tensor: Placeholder, dim0: int, dim1: int) -> Placeholder:
    """`torch.transpose`"""
    order = list(range(len(tensor.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return Placeholder(_permuted(tensor.weight, order))


def _chunk(tensor: Placeholder, chunks: int, dim: int = 0) -> tuple[Placeholder, ...]:
    """`torch.chunk`: the requested number of parts if the size permits, the last part perhaps smaller"""
    size = tensor.shape[dim]
    step = -(-size // chunks)
    return _split(tensor, [min(step, size - begin) for begin in range(0, size, step)], dim)


def _split(tensor: Placeholder, sizes: Sequence[int], dim: int = 0) -> tuple[Placeholder, ...]:
    """`torch.split` into parts of these sizes"""
    axis = range(len(tensor.shape))[dim]
    ends = list(accumulate(sizes))
    if ends[-1] != tensor.shape[axis]:
        raise NotFollowedError("sizes that do not fit")
    return tuple(
        Placeholder(_narrow(tensor.weight, axis, end - size, end)) for size, end in zip(sizes, ends, strict=True)
    )


_FOLLOWED: Mapping[str, Callable[..., Any]] = {
    "stack": _stack, "cat": _cat, "transpose": _transpose, "chunk": _chunk, "split": _split,
}  # fmt: skip
"""Supported functions of torch by name."""


@dataclass
class Assembly:
    """Stored tensors during their conversion by transformers."""

    converters: Sequence[Any]
    model: Any
    collected: dict[str, list[Part]] = field(default_factory=dict)
    """Inputs of each conversion by its first parameter, in the natural order of names."""

    def add(self, target: str, key: str, pattern: str, tensor: Weight) -> None:
        """Add a stored tensor, in the natural order of names, to the converter with this pattern."""
        self.collected.setdefault(target, []).append((pattern, key, tensor))

    def finish(self) -> dict[str, Weight]:
        """The assembled parameters by name."""
        rules = {source: rule for rule in self.converters for source in rule.source_patterns}
        assembled: dict[str, Weight] = {}
        for target, parts in self.collected.items():
            rule = rules[parts[0][0]]
            # Converters run without data first; only unsupported ones need the tensors.
            placeholders = [(pattern, key, Placeholder(_whole(tensor))) for pattern, key, tensor in parts]
            try:
                results = apply(rule, self.model, target, placeholders)
                assembled |= {name: placeholder.weight for name, placeholder in results.items()}
            except (NotFollowedError, TypeError):  # arithmetic on a stand-in is a TypeError
                assembled |= convert(rule, self.model, target, parts)
        return assembled


def _whole(tensor: Weight) -> Assembled:
    window, axes = tuple((0, size) for size in tensor.shape), tuple(range(len(tensor.shape)))
    return Assembled(tensor.shape, (Piece(tensor, window, axes, (0,) * len(axes)),), dtype=tensor.dtype)
