"""Blocks of a matrix in few bits: their format, integers, scales and zero points.

A matrix of shape (rows, columns) is cut along its rows into blocks of ``block_size`` entries of one column. Each block
has a scale, and a zero point if its range is not symmetric around zero. Arrays of scales and zero points have shape
(rows / block_size, columns). Columns do not depend on each other: matrices are processed in strips of columns, so that
little memory is used beside the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from planish.optimizer.system.machine import cores

_STRIP = 1 << 20
"""Elements of a matrix that are processed at a time."""

Parameters = tuple[np.ndarray, np.ndarray | None]
"""Scales and zero points of blocks; None instead of zero points if ranges are symmetric."""


@dataclass(frozen=True)
class BlockFormat:
    """Integers that a matrix is stored in, and the blocks that share a scale."""

    bits: int
    block_size: int
    """Entries of a column that share a scale; the rows of a matrix are a multiple of it."""
    symmetric: bool
    """True for signed integers and no zero points, False for unsigned integers and a zero point for each block."""

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        if self.symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    @property
    def dtype(self) -> type[np.int8 | np.uint8]:
        """Type of the integers, one a byte."""
        return np.int8 if self.symmetric else np.uint8


@dataclass(frozen=True)
class QuantizedBlocks:
    """Scales, zero points and integers of the blocks of a matrix.

    Integers that are the nearest ones are not kept: they take as much memory as the engine, and are computed from the
    matrix when they are written.
    """

    format: BlockFormat
    scale: np.ndarray
    """Float32, shape (rows / block_size, columns)."""
    zero_point: np.ndarray | None
    """Uint8, same shape; None if the format is symmetric."""
    chosen_integers: np.ndarray | None = None
    """Integers of the matrix, same shape as it, of a method that does not round to the nearest."""

    def integers(self, matrix: np.ndarray) -> np.ndarray:
        """Integers of ``matrix``, same shape, of the format's type."""
        integers = np.empty(matrix.shape, self.format.dtype)
        for strip in strips(matrix):
            integers[:, strip] = self._integers_of(matrix, strip).reshape(len(matrix), -1)
        return integers

    def dequantized(self, matrix: np.ndarray) -> np.ndarray:
        """Values that the integers of ``matrix`` stand for, float32, same shape."""
        values = np.empty(matrix.shape, np.float32)
        for strip in strips(matrix):
            zero_point = None if self.zero_point is None else self.zero_point[:, strip]
            blocks = dequantize(self._integers_of(matrix, strip), self.scale[:, strip], zero_point)
            values[:, strip] = blocks.reshape(len(matrix), -1)
        return values

    def _integers_of(self, matrix: np.ndarray, strip: slice) -> np.ndarray:
        """Integers of some columns, in float32, shape (blocks, entries, columns)."""
        if self.chosen_integers is not None:
            return cut(self.chosen_integers[:, strip], self.format.block_size)
        zero_point = None if self.zero_point is None else self.zero_point[:, strip]
        blocks = cut(matrix[:, strip], self.format.block_size)
        return quantize(blocks, self.scale[:, strip], zero_point, self.format)


def fit_in_strips(
    matrix: np.ndarray, block_format: BlockFormat, fit: Callable[[np.ndarray, BlockFormat], Parameters]
) -> QuantizedBlocks:
    """Blocks of ``matrix`` whose parameters ``fit`` chooses.

    ``fit`` takes float32 blocks of shape (blocks, entries, columns) and is called in several threads.
    """
    scale = np.empty((len(matrix) // block_format.block_size, matrix.shape[1]), np.float32)
    zero_point = None if block_format.symmetric else np.empty(scale.shape, np.uint8)

    def fit_strip(strip: slice) -> None:
        strip_scale, strip_zero_point = fit(cut(matrix[:, strip], block_format.block_size), block_format)
        scale[:, strip] = strip_scale
        if zero_point is not None and strip_zero_point is not None:
            zero_point[:, strip] = strip_zero_point

    # Threads, not processes: numpy releases the interpreter's lock inside its loops, and strips need no copies.
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(fit_strip, strips(matrix)))
    return QuantizedBlocks(block_format, scale, zero_point)


def strips(matrix: np.ndarray) -> Iterator[slice]:
    """Slices of columns that are processed together."""
    width = max(1, _STRIP // max(1, len(matrix)))
    return (slice(start, start + width) for start in range(0, matrix.shape[1], width))


def cut(matrix: np.ndarray, block_size: int) -> np.ndarray:
    """A matrix of shape (rows, columns) as float32 blocks of shape (blocks, entries, columns)."""
    return np.asarray(matrix, np.float32).reshape(-1, block_size, matrix.shape[1])


def parameters_of_range(blocks: np.ndarray, block_format: BlockFormat, share: np.float32) -> Parameters:
    """Scales and zero points that keep ``share`` of the range of each block."""
    low, high = block_format.limits
    if block_format.symmetric:
        # Both ends of the range are mapped to ±high: with -high - 1 as one end, zero would not stay zero.
        scale = np.abs(blocks).max(axis=1) * share / np.float32(high)
        return _nonzero(scale), None
    # The range always includes zero, so that zero is stored exactly and the zero point is one of the integers.
    lowest = np.minimum(blocks.min(axis=1), 0) * share
    scale = (np.maximum(blocks.max(axis=1), 0) * share - lowest) / np.float32(high - low)
    scale = _nonzero(scale).astype(np.float32)
    return scale, np.clip(np.rint(-lowest / scale), low, high)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    # A block of zeros has scale zero, and so has one whose scale is too small for float32: dividing by it gives NaN.
    return np.where(scale > 0, scale, np.float32(1))


def quantize(
    blocks: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, block_format: BlockFormat
) -> np.ndarray:
    """Integers of blocks, in float32, the nearest ones (a half to the even one)."""
    integers = np.rint(blocks / scale[:, None])
    integers = integers if zero_point is None else integers + zero_point[:, None]
    return np.asarray(np.clip(integers, *block_format.limits))


def dequantize(integers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None) -> np.ndarray:
    """Values that integers in float32 stand for, float32."""
    shifted = integers if zero_point is None else integers - zero_point[:, None]
    return np.asarray(shifted * scale[:, None], np.float32)
