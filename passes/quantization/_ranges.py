"""Ranges of activations over calibration data, and the scale and zero point of 256 fixed steps that follow."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from planish.optimizer.interfaces.observers import BINS, HistogramObserver, unusable_statistic
from planish.optimizer.interfaces.quantization_pass import MatMulSite

RangeMethod = Literal["minmax", "average", "percentile", "entropy", "mse"]
_PERCENT = 99.99
_SHARES = np.geomspace(1.0, 0.02, 79)
"""Shares of the largest magnitude that `mse` and `entropy` try."""
_LEVELS = 128
"""Steps of a magnitude in 8 bits."""
_EMPTY = 1e-12
"""Probability that is added to every level: the logarithm of an empty one would be infinite."""


def range_not_ready(site: MatMulSite) -> str | None:
    """Reason why an activation cannot have a fixed scale; None if it can."""
    return unusable_statistic(site.data, HistogramObserver, "fixed scales need")


@dataclass(frozen=True)
class QuantizationParameters:
    """Scale and zero point of an activation in 8 bits."""

    scale: float
    zero_point: int
    signed: bool
    """True for int8 around a zero point of zero, False for uint8."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the integers."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def dequantized(self, data: np.ndarray) -> np.ndarray:
        """Values that the integers of ``data`` stand for, float32."""
        limits = np.iinfo(self.dtype)
        integers = np.clip(np.rint(data / self.scale) + self.zero_point, limits.min, limits.max)
        return np.asarray((integers - self.zero_point) * self.scale, np.float32)


def parameters_of(histogram: HistogramObserver, method: RangeMethod, *, signed: bool) -> QuantizationParameters:
    """Scale and zero point for an activation; an activation that is always zero has a scale of one.

    The range is symmetric around zero if ``signed``, else it goes from the lowest to the highest entry.
    """
    low, high = _RANGES[method](histogram, signed=signed)
    # Padding and ReLU make zero the commonest entry: it must be one of the steps.
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / 127 if signed else (high - low) / 255
    # Four digits: batches that are added up in another order, or on another machine, then hardly change the engine.
    scale = float(np.float32(f"{scale:.4g}")) if scale > 0 else 1.0
    return QuantizationParameters(scale, 0 if signed else int(np.clip(round(-low / scale), 0, 255)), signed)


def _minmax(histogram: HistogramObserver, *, signed: bool) -> tuple[float, float]:
    """The extremes."""
    return histogram.low, histogram.high


def _average(histogram: HistogramObserver, *, signed: bool) -> tuple[float, float]:
    """The means of the extremes of batches: Jacob et al. 2018, section 3.1, take moving averages."""
    return histogram.lows / histogram.batches, histogram.highs / histogram.batches


def _percentile(histogram: HistogramObserver, *, signed: bool) -> tuple[float, float]:
    """Limits that leave out one entry in ten thousand, half of them on each side."""
    total = np.cumsum(histogram.counts) / max(int(histogram.counts.sum()), 1)
    outside = (100 - _PERCENT) / 200
    low = histogram.centers[int(np.searchsorted(total, outside))]
    high = histogram.centers[min(int(np.searchsorted(total, 1 - outside)), BINS - 1)]
    return max(float(low), histogram.low), min(float(high), histogram.high)


class _Loss(Protocol):
    def __call__(self, histogram: HistogramObserver, low: float, high: float, *, signed: bool) -> float: ...


def _search(histogram: HistogramObserver, *, signed: bool, loss: _Loss) -> tuple[float, float]:
    """The range with the least loss among shares of the whole range."""
    # Only finite batches are counted, and an activation may have none.
    if not histogram.counts.any():
        return histogram.low, histogram.high
    reach = max(-histogram.low, histogram.high)
    ranges = [(max(histogram.low, -share * reach), min(histogram.high, share * reach)) for share in _SHARES]
    return min(ranges, key=lambda limits: loss(histogram, *limits, signed=signed))


def _squared_error(histogram: HistogramObserver, low: float, high: float, *, signed: bool) -> float:
    """Squared error of all entries, each taken to be at the center of its bin (Sung et al. 2015)."""
    filled = np.flatnonzero(histogram.counts)
    low, high = (-max(-low, high), max(-low, high)) if signed else (min(low, 0.0), max(high, 0.0))
    step = (high - low) / 255
    if step <= 0:
        return float("inf")
    values = histogram.centers[filled]
    error = np.clip(np.rint((values - low) / step), 0, 255) * step + low - values
    return float((np.square(error) * histogram.counts[filled]).sum())


def _divergence(histogram: HistogramObserver, low: float, high: float, *, signed: bool) -> float:
    """Kullback-Leibler divergence of the magnitudes' distribution from its form in 128 levels.

    Migacz 2017, "8-bit Inference with TensorRT". Magnitudes beyond the range are clipped into the last bin.
    """
    magnitudes = (histogram.counts[BINS // 2 :] + histogram.counts[: BINS // 2][::-1]).astype(np.float64)
    # Fewer bins than levels would make every narrow range lossless.
    count = max(_LEVELS, int(np.ceil(max(-low, high) / histogram.bound * len(magnitudes))))
    fine = magnitudes[:count].copy()
    fine[-1] += magnitudes[count:].sum()
    filled = magnitudes[:count] > 0
    level = np.arange(count) * _LEVELS // count
    mass = np.bincount(level, magnitudes[:count], _LEVELS)
    bins = np.bincount(level, filled, _LEVELS)
    # A level's mass is spread over those of its bins that are filled: empty bins stay empty.
    coarse = np.where(filled, (mass / np.maximum(bins, 1))[level], 0)
    fine, coarse = fine / fine.sum(), (coarse + _EMPTY) / (coarse + _EMPTY).sum()
    inside = fine > 0
    return float((fine[inside] * np.log(fine[inside] / coarse[inside])).sum())


class _Range(Protocol):
    def __call__(self, histogram: HistogramObserver, *, signed: bool) -> tuple[float, float]: ...


_RANGES: dict[RangeMethod, _Range] = {
    "minmax": _minmax,
    "average": _average,
    "percentile": _percentile,
    "entropy": functools.partial(_search, loss=_divergence),
    "mse": functools.partial(_search, loss=_squared_error),
}
