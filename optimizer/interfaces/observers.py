"""Accumulators of what was seen of an activation: they take rows, batch after batch, and never grow.

Each is a small, mergeable summary: what it knows of a thousand batches has the size of what it knows of one.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar, TypeVar, cast

import numpy as np
import onnx_ir as ir

BINS = 4096


class Observer(abc.ABC):
    """What was seen of one activation; the first rows say how wide it is."""

    bulky: ClassVar[bool] = False
    """Whether it is forgotten as soon as the pass had a chance to use it (`Pass.digest`)."""

    rows: int = 0
    """How many rows were seen."""

    @classmethod
    @abc.abstractmethod
    def size(cls, width: int) -> int:
        """Bytes that it takes for rows of ``width`` entries."""

    @abc.abstractmethod
    def add(self, rows: np.ndarray) -> None:
        """Take in rows, float32, shape (rows, width)."""


Seen = TypeVar("Seen", bound=Observer)


def statistic_of(value: ir.Value, what: type[Seen]) -> Seen | None:
    """What was seen of a value; nothing if nobody looked, or if there were no rows."""
    found = cast("Seen | None", value.meta.get(what.__name__))
    return found if found is not None and found.rows else None


class HistogramObserver(Observer):
    """The distribution of all entries: extremes, and a histogram over a range that doubles as it must.

    Bins have equal width and the range is a power of two, so that two old bins make one new bin exactly.
    """

    def __init__(self) -> None:
        self.bound = 0.0
        """Bins are laid over [-bound, bound]."""
        self.counts = np.zeros(BINS, np.int64)
        self.low = math.inf
        self.high = -math.inf
        self.lows: float = 0.0
        self.highs: float = 0.0
        self.batches = 0

    @classmethod
    def size(cls, width: int) -> int:
        """The histogram's, whatever the width."""
        return BINS * 8

    def add(self, rows: np.ndarray) -> None:
        """Count entries; NaN or infinity makes the extremes NaN."""
        if not rows.size:
            return
        low, high = float(rows.min()), float(rows.max())
        self.rows += len(rows)
        self.batches += 1
        self.low, self.high = np.minimum(self.low, low).item(), np.maximum(self.high, high).item()
        self.lows += low
        self.highs += high
        if math.isfinite(low) and math.isfinite(high):
            self._grow(max(-low, high))
            self.counts += np.histogram(rows, BINS, (-self.bound, self.bound))[0]

    def _grow(self, largest: float) -> None:
        needed = 2.0 ** math.ceil(math.log2(max(largest, 2.0**-60)))
        if not self.counts.any():
            self.bound = max(self.bound, needed)
        while self.bound < needed:
            middle = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(middle, BINS // 4)
            self.bound *= 2

    @property
    def finite(self) -> bool:
        """Whether all entries were finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin."""
        return (np.arange(BINS) + 0.5) * (2 * self.bound / BINS) - self.bound


class ChannelObserver(Observer):
    """Each channel (entry of a row) by itself: extremes, mean, mean magnitude and mean square."""

    def __init__(self) -> None:
        self.low = np.zeros(1, np.float32)
        """Smallest entry, or zero."""
        self.high = np.zeros(1, np.float32)
        """Largest entry, or zero."""
        self._sums = np.zeros((3, 1), np.float64)

    @classmethod
    def size(cls, width: int) -> int:
        """Five numbers a channel."""
        return 32 * width

    def add(self, rows: np.ndarray) -> None:
        """Take in rows."""
        self.rows += len(rows)
        self.low = np.minimum(self.low, rows.min(axis=0, initial=0))
        self.high = np.maximum(self.high, rows.max(axis=0, initial=0))
        parts = (rows, np.abs(rows), np.square(rows))
        self._sums = self._sums + np.stack([part.sum(axis=0, dtype=np.float64) for part in parts])

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
    """Products of every two channels, summed over all rows: what the squared error of a product depends on.

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
        """Half a square matrix."""
        return 2 * width * (width + 1)

    def add(self, rows: np.ndarray) -> None:
        """Take in rows."""
        from scipy.linalg.lapack import ssfrk

        self.rows += len(rows)
        if not self._width:
            self._width = rows.shape[1]
            self._sums = np.zeros(self._width * (self._width + 1) // 2, np.float32)
        self._sums = ssfrk(self._width, len(rows), 1.0, rows.T, 1.0, self._sums, overwrite_c=1)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(np.isfinite(self._sums).all())

    @property
    def mean(self) -> np.ndarray:
        """The mean over rows, float32, shape (width, width)."""
        from scipy.linalg.lapack import stfttr

        if not self.rows:
            raise ValueError("nothing was seen")
        found, failed = stfttr(self._width, self._sums / np.float32(self.rows))
        if failed:
            raise ValueError(f"stfttr refuses its argument {-failed}")
        upper = np.triu(found)
        return np.asarray(upper + np.triu(found, 1).T)
