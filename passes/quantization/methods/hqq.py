"""Move zero points so that a few large errors count less than many small ones.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": the norm of the error with an
exponent below one is minimized by half-quadratic splitting, two alternating steps, each in closed form. Here zero
points are rounded, since those of the ONNX standard are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.quantization._blocks import (
    BlockFormat,
    Parameters,
    QuantizedBlocks,
    fit_in_strips,
    parameters_of_range,
    quantize,
)
from planish.passes.quantization.methods.weight_method import WeightMethod

_STEPS = 20
_NORM = np.float32(0.7)
"""Exponent p of the norm."""
_PENALTY, _GROWTH = np.float32(10), np.float32(1.01)
"""Weight of the penalty that ties both steps together, and its factor from one step to the next."""
_EPSILON = np.float32(1e-12)
"""Added to magnitudes: an error of zero to a negative power would be infinite."""


@dataclass(frozen=True)
class Hqq(WeightMethod):
    """Search zero points with a half-quadratic solver; `nearest` if the format has none."""

    name: ClassVar[str] = "hqq"

    def fit(self, matrix: np.ndarray, activation: ir.Value | None = None) -> QuantizedBlocks:
        """Take scales from the whole range of each block, and zero points from the solver."""
        return fit_in_strips(matrix, self.format, _solve)


def _solve(blocks: np.ndarray, block_format: BlockFormat) -> Parameters:
    """Scales and zero points of blocks."""
    scale, zero_point = parameters_of_range(blocks, block_format, np.float32(1))
    if zero_point is None:
        return scale, None
    return scale, _search_zero_points(blocks, scale, zero_point, block_format)


def _search_zero_points(
    blocks: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, block_format: BlockFormat
) -> np.ndarray:
    """Zero points with the least norm of the error; blocks that the solver makes worse keep ``zero_point``."""
    penalty, step = _PENALTY, scale[:, None]
    best, least = zero_point, np.full(zero_point.shape, np.inf, np.float32)
    for _ in range(_STEPS):
        integers = quantize(blocks, scale, zero_point, block_format)
        error = blocks - (integers - zero_point[:, None]) * step
        magnitude = np.abs(error)
        weight = (magnitude + _EPSILON) ** (_NORM - 1)
        total = np.einsum("bec,bec->bc", magnitude, weight)
        # The authors' code ends as soon as the sum over all blocks stops falling, and so does this.
        if total.sum(dtype=np.float64) >= least.sum(dtype=np.float64):
            break
        best, least = np.where(total < least, np.rint(zero_point), best), np.minimum(total, least)
        shrunk = np.copysign(np.maximum(magnitude - weight / penalty, 0), error)
        zero_point = np.rint((integers - (blocks - shrunk) / step).mean(axis=1))
        penalty *= _GROWTH
    # The solver knows no limits: a zero point must be one of the integers of the format.
    return np.asarray(np.clip(best, *block_format.limits))
