"""Lazy tensors: read, cut or quantized when their values are needed, and released afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.graph import sizes_of

Read = Callable[[], np.ndarray]


class LazyArray:
    """A function that computes an array. While the last array is referenced, it is returned again."""

    def __init__(self, read: Read, dtype: ir.DataType, origin: object = None) -> None:
        self._read = read
        self._dtype = dtype
        self.origin = origin
        """The identity of the content: equal origins mean equal arrays. Passes may derive a better reader from it."""
        self._last: weakref.ref[np.ndarray] | None = None

    def __call__(self) -> ir.TensorProtocol:
        """The array as a tensor."""
        array = None if self._last is None else self._last()
        if array is None:
            array = self._read()
            # A weak reference: memory is released with the last user, and concurrent users share one array.
            self._last = weakref.ref(array)
        return ir.Tensor(array, dtype=self._dtype)


class _Streamed(ir.LazyTensor):
    """A lazy tensor that is written to a file piece by piece."""

    strips: Callable[[], Iterator[np.ndarray]] | None = None

    def tofile(self, file: BinaryIO) -> None:
        """Write its bytes."""
        if self.strips is None:
            super().tofile(file)
            return
        for strip in self.strips():
            ir.Tensor(strip, dtype=self.dtype).tofile(file)


def lazy(
    read: Read,
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
    origin: object = None,
    strips: Callable[[], Iterator[np.ndarray]] | None = None,
) -> ir.LazyTensor:
    """A tensor of known type and shape whose values ``read`` computes each time they are needed.

    ``strips`` gives the same values piece by piece in memory order. With it, the tensor is written to a file without
    ever being whole in memory.
    """
    tensor = _Streamed(LazyArray(read, dtype, origin), dtype, ir.Shape(shape), cache=False, name=name)
    # cache=False above: onnx_ir would otherwise keep every weight that was ever read.
    tensor.strips = strips
    return tensor


def origin_of(tensor: ir.TensorProtocol | None) -> object:
    """Identity of the content of a tensor, without reading it: equal origins mean equal content.

    None if the content itself would have to be read.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return (str(tensor.path), tensor.offset, tensor.length)
    lazy_array = getattr(tensor, "_func", None)
    return lazy_array.origin if isinstance(lazy_array, LazyArray) else None


@runtime_checkable
class Turnable(Protocol):
    """An origin from which the origin of the transposed tensor follows."""

    def transposed(self, permutation: tuple[int, ...]) -> object:
        """The origin of the tensor with its axes in this order."""


def taken(tensor: ir.TensorProtocol, kept: np.ndarray, axis: int, name: str) -> ir.TensorProtocol:
    """The entries ``kept`` of a tensor along ``axis``, selected lazily."""
    shape = [len(kept) if index == axis else size for index, size in enumerate(sizes_of(tensor))]
    return lazy(lambda: np.ascontiguousarray(tensor.numpy().take(kept, axis)), tensor.dtype, shape, name)
