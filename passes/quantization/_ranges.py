"""Which range of an activation is kept when it gets 256 fixed steps: from what was seen of it over calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.optimizer.interfaces.observers import BINS, ChannelObserver, HistogramObserver, statistic_of
from planish.optimizer.interfaces.quantization_pass import MatMulSite

RangeMethod = Literal["minmax", "average", "percentile", "entropy", "mse"]
_PERCENT = 99.99
_SHARES = np.geomspace(1.0, 0.02, 79)
"""Shares of the largest magnitude that `mse` and `entropy` try."""
_LEVELS = 128
"""Steps of a magnitude in 8 bits."""


def range_unready(site: MatMulSite) -> str | None:
    """Why an activation cannot get fixed steps; nothing if it can."""
    found = statistic_of(site.data, HistogramObserver)
    if found is None:
        return "nothing was seen of its activation: fixed scales need calibration data"
    return None if found.finite else "its activation holds NaN or infinity"


@dataclass(frozen=True)
class Steps:
    """Scale and zero point of 256 steps."""

    scale: float
    zero_point: int
    signed: bool
    """int8 around a zero point of zero, or uint8."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the integers."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def dequantized_input(self, data: np.ndarray) -> np.ndarray:
        """Real numbers as their nearest steps stand for them."""
        limits = np.iinfo(self.dtype)
        steps = np.clip(np.rint(data / self.scale) + self.zero_point, limits.min, limits.max)
        return np.asarray((steps - self.zero_point) * self.scale, np.float32)


def steps_for(shown: HistogramObserver, method: RangeMethod, *, signed: bool) -> Steps:
    """Steps for what was seen: symmetric around zero if ``signed``, else from the lowest to the highest entry.

    `minmax` keeps everything; `average` the mean of the batches' extremes (Jacob et al. 2018, section 3.1, keep a
    moving one); `percentile` all but one entry in ten thousand; `entropy` the range whose rounded distribution is
    closest to the true one (Migacz 2017, "8-bit inference with TensorRT"); `mse` that with the least squared error
    (Sung et al. 2015). An activation that is always zero has a scale of one.
    """
    low, high = _kept(shown, method, signed=signed)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / 127 if signed else (high - low) / 255
    scale = float(np.float32(f"{scale:.4g}")) if scale > 0 else 1.0
    return Steps(scale, 0 if signed else int(np.clip(round(-low / scale), 0, 255)), signed)


def _kept(shown: HistogramObserver, method: RangeMethod, *, signed: bool) -> tuple[float, float]:
    if method == "average":
        return shown.lows / shown.batches, shown.highs / shown.batches
    if method == "percentile":
        return _percentile(shown)
    if method == "minmax" or not shown.counts.any():
        return shown.low, shown.high
    loss = _divergence if method == "entropy" else _squared_error
    reach = max(-shown.low, shown.high)
    tried = [(max(shown.low, -share * reach), min(shown.high, share * reach)) for share in _SHARES]
    return min(tried, key=lambda kept: loss(shown, *kept, signed=signed))


def _percentile(shown: HistogramObserver) -> tuple[float, float]:
    """Limits beyond which lies as much on each side as two-sided percentiles leave out."""
    total = np.cumsum(shown.counts) / max(int(shown.counts.sum()), 1)
    outside = (100 - _PERCENT) / 200
    low = shown.centers[int(np.searchsorted(total, outside))]
    high = shown.centers[min(int(np.searchsorted(total, 1 - outside)), BINS - 1)]
    return max(float(low), shown.low), min(float(high), shown.high)


def _squared_error(shown: HistogramObserver, low: float, high: float, *, signed: bool) -> float:
    """Of all entries, each taken to lie in the middle of its bin."""
    filled = np.flatnonzero(shown.counts)
    low, high = (-max(-low, high), max(-low, high)) if signed else (min(low, 0.0), max(high, 0.0))
    step = (high - low) / 255
    if step <= 0:
        return float("inf")
    values = shown.centers[filled]
    error = np.clip(np.rint((values - low) / step), 0, 255) * step + low - values
    return float((np.square(error) * shown.counts[filled]).sum())


def _divergence(shown: HistogramObserver, low: float, high: float, *, signed: bool) -> float:
    """Kullback-Leibler divergence of magnitudes from themselves in 128 steps, beyond the range clipped into it."""
    folded = (shown.counts[BINS // 2 :] + shown.counts[: BINS // 2][::-1]).astype(np.float64)
    count = max(_LEVELS, int(np.ceil(max(-low, high) / shown.bound * len(folded))))
    true = folded[:count].copy()
    true[-1] += folded[count:].sum()
    filled = folded[:count] > 0
    level = np.arange(count) * _LEVELS // count
    mass = np.bincount(level, folded[:count], _LEVELS)
    share = np.bincount(level, filled, _LEVELS)
    coarse = np.where(filled, (mass / np.maximum(share, 1))[level], 0)
    true, coarse = true / true.sum(), (coarse + 1e-12) / (coarse + 1e-12).sum()
    inside = true > 0
    return float((true[inside] * np.log(true[inside] / coarse[inside])).sum())


def expected_error(channels: ChannelObserver, scale: np.ndarray, matrices: Sequence[np.ndarray]) -> float:
    """Expected squared error of products with an activation in 256 fixed steps and columns in 255.

    Channels are divided by ``scale``, rows multiplied by it; a channel whose scale is zero is left out. An entry that
    is rounded to steps of a size is off by a twelfth of its square in the mean.
    """
    inverse = np.divide(1, scale, where=scale > 0, out=np.zeros_like(scale))
    step = float((channels.high * inverse).max() - (channels.low * inverse).min()) / 255
    power = float((channels.square * np.square(inverse)).sum())
    error = 0.0
    for matrix in matrices:
        scaled = matrix * scale[:, None]
        error += step**2 * float(np.square(scaled).sum()) / 12
        error += power * float(np.square(np.abs(scaled).max(axis=0) / 127).sum()) / 12
    return error
