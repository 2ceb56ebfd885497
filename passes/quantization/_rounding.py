"""Matrices in few bits: which integers, scales and zero points stand for their blocks.

A matrix of shape (rows, columns) is cut along its rows into blocks of ``block`` entries of one column; each block has a
scale, and a zero point where the range is not symmetric. Arrays of scales have shape (rows / block, columns). Columns
have nothing to do with each other: work is done strip by strip, so that it takes little memory beside the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.optimizer.system.machine import cores

Method = Literal["nearest", "mse", "hqq"]
_STRIP = 1 << 20
"""Elements of a matrix that are worked on at a time."""
_CLIPS = np.linspace(1.0, 0.5, 26, dtype=np.float32)
"""Shares of a block's range that are tried as the range that is kept."""
_ROUNDS, _NORM, _BETA, _GROWTH = 20, np.float32(0.7), np.float32(10), np.float32(1.01)
"""Of the half-quadratic solver: steps, the exponent of its norm, the weight of its penalty and how that grows."""
_EPSILON = np.float32(1e-12)
"""What keeps its power of an error of zero finite."""


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a matrix are rounded."""

    scale: np.ndarray
    """Float, shape (rows / block, columns)."""
    zero_point: np.ndarray | None
    """Whole numbers of the same shape; None for a range that is symmetric around zero."""
    bits: int
    chosen: np.ndarray | None = None
    """The integers themselves, shape of the matrix, where they are not simply the nearest."""

    def integers(self, matrix: np.ndarray) -> np.ndarray:
        """The entries of the matrix as whole numbers, shape as given, int8 or (with zero points) uint8."""
        found = np.empty(matrix.shape, self.dtype)
        for strip in strips(matrix):
            found[:, strip] = self._steps(matrix, strip).reshape(len(matrix), -1)
        return found

    def restored(self, matrix: np.ndarray) -> np.ndarray:
        """What the integers of the matrix stand for, float32, shape as given."""
        found = np.empty(matrix.shape, np.float32)
        for strip in strips(matrix):
            zero = None if self.zero_point is None else self.zero_point[:, strip]
            real = _real(self._steps(matrix, strip), self.scale[:, strip], zero)
            found[:, strip] = real.reshape(len(matrix), -1)
        return found

    @property
    def dtype(self) -> type[np.int8 | np.uint8]:
        """What the integers are stored as."""
        return np.int8 if self.zero_point is None else np.uint8

    def _steps(self, matrix: np.ndarray, strip: slice) -> np.ndarray:
        """Whole numbers of some columns, in float, shape (blocks, entries, columns)."""
        if self.chosen is not None:
            return _cut(self.chosen[:, strip], len(self.scale))
        zero = None if self.zero_point is None else self.zero_point[:, strip]
        return _round(_cut(matrix[:, strip], len(self.scale)), self.scale[:, strip], zero, self.bits)


def blocks_of(matrix: np.ndarray, bits: int, block: int, *, symmetric: bool, method: Method) -> Blocks:
    """Scales and zero points for a float matrix whose rows are a multiple of ``block``.

    `nearest` keeps the whole range of each block; `mse` keeps the share of it that leaves the least squared error
    (as in Banner et al. 2019, "Post training 4-bit quantization", section 3, found by search); `hqq` moves zero points
    so that few large errors count less than many small ones (Badri and Shaji 2023, "Half-Quadratic Quantization"), and
    rounds them, since the standard's zero points are whole.
    """
    count = len(matrix) // block
    scale = np.empty((count, matrix.shape[1]), np.float32)
    zero = None if symmetric else np.empty(scale.shape, np.uint8)

    def fit(strip: slice) -> None:
        found = _fitted(_cut(matrix[:, strip], count), bits, symmetric=symmetric, method=method)
        scale[:, strip] = found[0]
        if zero is not None and found[1] is not None:
            zero[:, strip] = found[1]

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(fit, strips(matrix)))
    return Blocks(scale, zero, bits)


def strips(matrix: np.ndarray) -> Iterator[slice]:
    """Columns that are worked on together."""
    width = max(1, _STRIP // max(1, len(matrix)))
    return (slice(start, start + width) for start in range(0, matrix.shape[1], width))


def _fitted(cut: np.ndarray, bits: int, *, symmetric: bool, method: Method) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zero points of blocks."""
    if method == "mse":
        return _clipped(cut, bits, symmetric=symmetric)
    scale, zero = _ranged(cut, bits, np.float32(1), symmetric=symmetric)
    return scale, _half_quadratic(cut, scale, zero, bits) if method == "hqq" and zero is not None else zero


def _cut(matrix: np.ndarray, count: int) -> np.ndarray:
    """(rows, columns) as (blocks, entries, columns)."""
    return np.asarray(matrix, np.float32).reshape(count, -1, matrix.shape[1])


def limits(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest integer."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


def _ranged(
    blocks: np.ndarray, bits: int, share: np.float32, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale and zero point of blocks that keep a share of their range; a block of zeros has scale one."""
    low, high = limits(bits, symmetric=symmetric)
    if symmetric:
        scale = np.abs(blocks).max(axis=1) * share / np.float32(high)
        return np.where(scale > 0, scale, np.float32(1)), None
    lowest = np.minimum(blocks.min(axis=1), 0) * share
    scale = (np.maximum(blocks.max(axis=1), 0) * share - lowest) / np.float32(high - low)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return scale, np.clip(np.rint(-lowest / scale), low, high)


def _clipped(blocks: np.ndarray, bits: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Of all shares of the range the one with the least squared error, for each block."""
    best, best_zero = _ranged(blocks, bits, _CLIPS[0], symmetric=symmetric)
    least = np.full(best.shape, np.inf, np.float32)
    low, high = limits(bits, symmetric=symmetric)
    error = np.empty_like(blocks)
    for share in _CLIPS:
        scale, zero = _ranged(blocks, bits, share, symmetric=symmetric)
        bottom, top = (low, high) if zero is None else (low - zero[:, None], high - zero[:, None])
        np.divide(blocks, scale[:, None], out=error)
        np.rint(error, out=error)
        np.clip(error, bottom, top, out=error)
        error *= scale[:, None]
        error -= blocks
        total = np.einsum("bec,bec->bc", error, error)
        better = total < least
        least, best = np.where(better, total, least), np.where(better, scale, best)
        best_zero = None if zero is None or best_zero is None else np.where(better, zero, best_zero)
    return best.astype(np.float32), best_zero


def _half_quadratic(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Zero points that the half-quadratic solver ends with; those of a block that it makes worse stay.

    It ends when a step makes nothing better on the whole, as the authors' does.
    """
    beta, found, step = _BETA, zero, scale[:, None]
    best, least = zero, np.full(zero.shape, np.inf, np.float32)
    for _ in range(_ROUNDS):
        integers = _round(blocks, scale, found, bits)
        error = blocks - (integers - found[:, None]) * step
        size = np.abs(error)
        weight = (size + _EPSILON) ** (_NORM - 1)
        total = np.einsum("bec,bec->bc", size, weight)
        if total.sum(dtype=np.float64) >= least.sum(dtype=np.float64):
            break
        best, least = np.where(total < least, np.rint(found), best), np.minimum(total, least)
        kept = np.copysign(np.maximum(size - weight / beta, 0), error)
        found = np.rint((integers - (blocks - kept) / step).mean(axis=1))
        beta *= _GROWTH
    return np.asarray(np.clip(best, *limits(bits, symmetric=False)))


def _round(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> np.ndarray:
    """Blocks as whole numbers (in float), rounded to even."""
    steps = np.rint(blocks / scale[:, None])
    steps = steps if zero is None else steps + zero[:, None]
    return np.asarray(np.clip(steps, *limits(bits, symmetric=zero is None)))


def _real(integers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    shifted = integers if zero is None else integers - zero[:, None]
    return np.asarray(shifted * scale[:, None], np.float32)
