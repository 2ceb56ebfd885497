"""Clip the range of a block where that leaves the least squared error.

Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment", section 3, derive
the best range from a distribution; here it is found by search over the entries themselves.
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
)
from planish.passes.quantization.methods.weight_method import WeightMethod

_SHARES = np.linspace(1.0, 0.5, 26, dtype=np.float32)
"""Shares of a block's range that are tried. The whole range comes first, and stays unless another is better."""


@dataclass(frozen=True)
class Mse(WeightMethod):
    """Keep the share of each block's range that leaves the least squared error."""

    name: ClassVar[str] = "mse"

    def fit(self, matrix: np.ndarray, activation: ir.Value | None = None) -> QuantizedBlocks:
        """Search the share of each block's range."""
        return fit_in_strips(matrix, self.format, _search_share)


def _search_share(blocks: np.ndarray, block_format: BlockFormat) -> Parameters:
    """Scales and zero points of the best share of each block."""
    best_scale, best_zero_point = parameters_of_range(blocks, block_format, _SHARES[0])
    least = np.full(best_scale.shape, np.inf, np.float32)
    error = np.empty_like(blocks)
    for share in _SHARES:
        scale, zero_point = parameters_of_range(blocks, block_format, share)
        _error(blocks, scale, zero_point, block_format, out=error)
        total = np.einsum("bec,bec->bc", error, error)
        better = total < least
        least, best_scale = np.where(better, total, least), np.where(better, scale, best_scale)
        if zero_point is not None and best_zero_point is not None:
            best_zero_point = np.where(better, zero_point, best_zero_point)
    return best_scale.astype(np.float32), best_zero_point


def _error(
    blocks: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, block_format: BlockFormat, *, out: np.ndarray
) -> None:
    """Write the rounding error of each entry to ``out``."""
    low, high = block_format.limits
    # In place, and with limits shifted instead of integers: none of 26 shares then allocates arrays of a strip's size.
    bottom, top = (low, high) if zero_point is None else (low - zero_point[:, None], high - zero_point[:, None])
    np.divide(blocks, scale[:, None], out=out)
    np.rint(out, out=out)
    np.clip(out, bottom, top, out=out)
    out *= scale[:, None]
    out -= blocks
