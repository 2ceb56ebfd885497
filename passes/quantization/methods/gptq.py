"""Quantize a matrix row by row; the rows that follow compensate for the error of each.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", section 4.
Rows are taken in the order of their channels' mean square, the largest first, and the scales of blocks are fixed
beforehand, so that they keep their places (act-order and static groups in the authors' code).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import GramObserver, Observer, statistic_of
from planish.passes.quantization._blocks import QuantizedBlocks, strips
from planish.passes.quantization.methods.mse import Mse
from planish.passes.quantization.methods.weight_method import WeightMethod

_DAMPING = 0.01
"""Share of the mean of the diagonal that is added to the diagonal."""
_ROWS = 128
"""Rows whose errors are passed on together."""


@dataclass(frozen=True)
class Gptq(WeightMethod):
    """Choose integers that keep the products with calibration data instead of the matrix itself."""

    name: ClassVar[str] = "gptq"
    statistics: ClassVar[tuple[type[Observer], ...]] = (GramObserver,)

    def fit(self, matrix: np.ndarray, activation: ir.Value | None = None) -> QuantizedBlocks:
        """Take scales and zero points from `mse`, and choose the integers."""
        gram = None if activation is None else statistic_of(activation, GramObserver)
        if gram is None:
            raise ValueError(f"no Gram matrix of {activation and activation.name!r} was collected")
        return _choose_integers(matrix, gram.mean, Mse(self.format).fit(matrix))


def _choose_integers(matrix: np.ndarray, gram: np.ndarray, blocks: QuantizedBlocks) -> QuantizedBlocks:
    """``blocks`` with integers that minimize the error of the product of the inputs and ``matrix``.

    ``matrix`` has shape (rows, columns); ``gram``, shape (rows, rows), is the mean of xᵀ · x over inputs x.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _inverse_factor(gram[np.ix_(order, order)])
    integers = np.empty(matrix.shape, blocks.format.dtype)
    for strip in strips(matrix):
        # Zero points are unsigned bytes: in float, differences to them cannot wrap around.
        zero_point = None if blocks.zero_point is None else blocks.zero_point[:, strip].astype(np.float32)
        strip_blocks = replace(blocks, scale=blocks.scale[:, strip], zero_point=zero_point)
        integers[order, strip] = _quantize_rows(matrix[order, strip], order, factor, strip_blocks)
    return replace(blocks, chosen_integers=integers)


def _quantize_rows(rest: np.ndarray, order: np.ndarray, factor: np.ndarray, blocks: QuantizedBlocks) -> np.ndarray:
    """Integers, in float32, of the rows of ``rest``, which are in ``order``; ``rest`` is overwritten."""
    low, high = blocks.format.limits
    integers = np.empty_like(rest)
    for start in range(0, len(rest), _ROWS):
        end = min(start + _ROWS, len(rest))
        errors = np.empty((end - start, rest.shape[1]), np.float32)
        for row in range(start, end):
            block = order[row] // blocks.format.block_size
            scale = blocks.scale[block]
            zero_point = np.float32(0) if blocks.zero_point is None else blocks.zero_point[block]
            integers[row] = np.clip(np.rint(rest[row] / scale) + zero_point, low, high)
            errors[row - start] = (rest[row] - (integers[row] - zero_point) * scale) / factor[row, row]
            rest[row + 1 : end] -= factor[row, row + 1 : end, None] * errors[row - start]
        # Lazy batch updates: later rows get the errors of a whole group by one matrix product. Row by row, the time
        # would go into reading them again and again.
        rest[end:] -= factor[start:end, end:].T @ errors
    return integers


def _inverse_factor(gram: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped matrix, float32."""
    from scipy.linalg.lapack import dpotrf, dpotri

    damped = np.array(gram, np.float64, order="F")
    diagonal = np.diag(damped).copy()
    unused = diagonal == 0
    damping = _DAMPING * (diagonal.mean() if diagonal.any() else 1.0)
    # A channel that is always zero gets a one: its row may be rounded in any way, and the matrix stays invertible.
    damped[np.diag_indices_from(damped)] = np.where(unused, 1.0, diagonal) + damping
    # All three calls work in place: a copy for 11,008 channels takes 1 GB in float64.
    inverse = _checked(dpotri(_checked(dpotrf(damped, overwrite_a=1)), overwrite_c=1))
    return np.triu(_checked(dpotrf(inverse, overwrite_a=1))).astype(np.float32)


def _checked(result: tuple[np.ndarray, int]) -> np.ndarray:
    """The matrix that a function of LAPACK returns; FloatingPointError if it failed."""
    matrix, status = result
    if status:
        raise FloatingPointError(f"a damped Gram matrix is not positive definite: LAPACK returned {status}")
    return matrix
