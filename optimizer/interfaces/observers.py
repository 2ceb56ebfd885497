"""Observers: statistics of one activation over calibration data.

An observer adds up rows, batch after batch. Its size depends on the width of the activation alone, not on the number of
batches.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar, TypeVar, cast

import numpy as np
import onnx_ir as ir

BINS = 4096
"""Bins of a histogram."""


class Observer(abc.ABC):
    """Statistics of one activation; its width is that of the first rows."""

    bulky: ClassVar[bool] = False
    """True for statistics so large that they are dropped after `Pass.consume`, before the next ones are collected."""

    rows: int = 0
    """Number of rows that were added."""

    @classmethod
    @abc.abstractmethod
    def size(cls, width: int) -> int:
        """Bytes of the statistics for rows of ``width`` entries."""

    @abc.abstractmethod
    def add(self, rows: np.ndarray) -> None:
        """Add rows, float32, shape (rows, width)."""

    @property
    @abc.abstractmethod
    def finite(self) -> bool:
        """True if no entry of any row was NaN or infinity."""


AnyObserver = TypeVar("AnyObserver", bound=Observer)


def statistic_of(value: ir.Value, kind: type[AnyObserver]) -> AnyObserver | None:
    """The statistics of a value; None if they were not collected, or if there were no rows."""
    observer = cast("AnyObserver | None", value.meta.get(kind.__name__))
    return observer if observer is not None and observer.rows else None


def unusable_statistic(value: ir.Value, kind: type[Observer], who_needs: str) -> str | None:
    """Reason why a pass cannot use the statistics of an activation; None if it can.

    ``who_needs`` is the subject and verb of the reason: "gptq needs", "fixed scales need".
    """
    observer = statistic_of(value, kind)
    if observer is None:
        return f"nothing was seen of its activation: {who_needs} calibration data"
    return None if observer.finite else "its activation holds NaN or infinity"


class HistogramObserver(Observer):
    """Distribution of all entries: extremes, and a histogram whose range doubles until it holds every entry.

    Bins have equal width, and the range is a power of two: two old bins are exactly one new bin.
    """

    def __init__(self) -> None:
        self.bound = 0.0
        """The bins cover [-bound, bound]."""
        self.counts = np.zeros(BINS, np.int64)
        """Entries in each bin."""
        self.low = math.inf
        """Smallest entry; NaN if an entry was NaN."""
        self.high = -math.inf
        """Largest entry; NaN if an entry was NaN."""
        self.lows: float = 0.0
        """Sum of the smallest entries of batches."""
        self.highs: float = 0.0
        """Sum of the largest entries of batches."""
        self.batches = 0

    @classmethod
    def size(cls, width: int) -> int:
        """Bytes of the histogram, the same for every width."""
        return BINS * 8

    def add(self, rows: np.ndarray) -> None:
        """Count entries; NaN or infinity makes the extremes NaN."""
        if not rows.size:
            return
        low, high = float(rows.min()), float(rows.max())
        self.rows += len(rows)
        self.batches += 1
        # The functions of numpy, not min and max: these would lose a NaN, depending on the order of operands.
        self.low, self.high = np.minimum(self.low, low).item(), np.maximum(self.high, high).item()
        self.lows += low
        self.highs += high
        if math.isfinite(low) and math.isfinite(high):
            self._grow(max(-low, high))
            self.counts += np.histogram(rows, BINS, (-self.bound, self.bound))[0]

    def _grow(self, largest: float) -> None:
        # A lower limit, since zero has no logarithm.
        needed = 2.0 ** math.ceil(math.log2(max(largest, 2.0**-60)))
        if not self.counts.any():
            self.bound = max(self.bound, needed)
        while self.bound < needed:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(merged, BINS // 4)
            self.bound *= 2

    @property
    def finite(self) -> bool:
        """True if both extremes are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def centers(self) -> np.ndarray:
        """Center of each bin."""
        return (np.arange(BINS) + 0.5) * (2 * self.bound / BINS) - self.bound


class ChannelObserver(Observer):
    """Statistics of each channel (entry of a row): extremes, mean, mean magnitude and mean square."""

    def __init__(self) -> None:
        self.low = np.zeros(1, np.float32)
        """Smallest entry, or zero."""
        self.high = np.zeros(1, np.float32)
        """Largest entry, or zero."""
        # Float64: sums over millions of rows lose small terms in float32.
        self._sums = np.zeros((3, 1), np.float64)

    @classmethod
    def size(cls, width: int) -> int:
        """Bytes of five numbers a channel."""
        return 32 * width

    def add(self, rows: np.ndarray) -> None:
        """Add rows to the sums of each channel."""
        self.rows += len(rows)
        self.low = np.minimum(self.low, rows.min(axis=0, initial=0))
        self.high = np.maximum(self.high, rows.max(axis=0, initial=0))
        parts = (rows, np.abs(rows), np.square(rows))
        self._sums = self._sums + np.stack([part.sum(axis=0, dtype=np.float64) for part in parts])

    @property
    def finite(self) -> bool:
        """True if the extremes of all channels are finite."""
        return bool(np.isfinite(self.largest).all())

    @property
    def largest(self) -> np.ndarray:
        """Largest magnitude of each channel, float32."""
        return np.maximum(-self.low, self.high)

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel, float32."""
        return self._mean(0)

    @property
    def magnitude(self) -> np.ndarray:
        """Mean magnitude of each channel, float32."""
        return self._mean(1)

    @property
    def square(self) -> np.ndarray:
        """Mean square of each channel, float32."""
        return self._mean(2)

    def _mean(self, index: int) -> np.ndarray:
        return np.asarray(self._sums[index] / max(self.rows, 1), np.float32)


class GramObserver(Observer):
    """Gram matrix of an activation: sums over all rows of the products of every two channels.

    For an error E of a matrix, the squared error of X · E is the trace of Eᵀ · (Xᵀ · X) · E.
    """

    bulky: ClassVar[bool] = True

    def __init__(self) -> None:
        self._sums = np.zeros(0, np.float32)
        """Sum over rows of rowᵀ · row: one triangle, packed as LAPACK's rectangular full format (Gustavson et al. 2010,
        "Rectangular Full Packed Format for Cholesky's Algorithm")."""
        self._width = 0

    @classmethod
    def size(cls, width: int) -> int:
        """Bytes of half a square matrix."""
        return 2 * width * (width + 1)

    def add(self, rows: np.ndarray) -> None:
        """Add the products of the channels of each row."""
        from scipy.linalg.lapack import ssfrk

        self.rows += len(rows)
        if not self._width:
            self._width = rows.shape[1]
            self._sums = np.zeros(self._width * (self._width + 1) // 2, np.float32)
        self._sums = ssfrk(self._width, len(rows), 1.0, rows.T, 1.0, self._sums, overwrite_c=1)

    @property
    def finite(self) -> bool:
        """True if all sums are finite."""
        return bool(np.isfinite(self._sums).all())

    @property
    def mean(self) -> np.ndarray:
        """Mean of the products over rows, float32, shape (width, width)."""
        from scipy.linalg.lapack import stfttr

        if not self.rows:
            raise ValueError("a Gram matrix has no mean before rows are added")
        unpacked, status = stfttr(self._width, self._sums / np.float32(self.rows))
        if status:
            raise ValueError(f"stfttr refuses its argument {-status}")
        # LAPACK leaves the other triangle as it was: uninitialized.
        upper = np.triu(unpacked)
        return np.asarray(upper + np.triu(unpacked, 1).T)
