"""Round a matrix row by row, and let the rows that are still to come make up for the error of each.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers": rows are taken
in order of how strong their channel is, and scales of blocks are found beforehand, so that they stay where they are
(what the authors' code calls act-order and static groups).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import numpy as np

from planish.optimizer.observations import Gram, seen
from planish.optimizer.quantizing import Site
from planish.passes.quantization._rounding import Blocks, blocks_of, limits

AnyMethod = Literal["nearest", "mse", "hqq", "gptq"]

_DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
_STRIP = 128
"""Rows whose errors are handed on together."""


def unready(site: Site, method: AnyMethod) -> str | None:
    """Why a matrix cannot be rounded in a way; nothing if it can."""
    if method != "gptq":
        return None
    found = seen(site.data, Gram)
    if found is None:
        return "nothing was seen of its activation: gptq needs calibration data"
    return None if np.isfinite(found.matrix).all() else "its activation holds NaN or infinity"


def blocks_for(site: Site, bits: int, block: int, *, symmetric: bool, method: AnyMethod) -> Blocks:
    """Scales and, for gptq, integers of a matrix; kept beside it, since they are asked for in every trial."""
    key = f"blocks {bits} {block} {symmetric} {method}"
    if key not in site.weight.meta:
        site.weight.meta[key] = _found(site, bits, block, symmetric=symmetric, method=method)
    return cast("Blocks", site.weight.meta[key])


def _found(site: Site, bits: int, block: int, *, symmetric: bool, method: AnyMethod) -> Blocks:
    matrix, gram = site.tensor.numpy(), seen(site.data, Gram)
    scaled = blocks_of(matrix, bits, block, symmetric=symmetric, method="mse" if method == "gptq" else method)
    return gptq(matrix, gram.mean, scaled) if method == "gptq" and gram is not None else scaled


def gptq(matrix: np.ndarray, gram: np.ndarray, found: Blocks) -> Blocks:
    """``found`` with integers that keep the product of inputs and ``matrix`` instead of the matrix itself.

    ``matrix`` has shape (rows, columns); ``gram``, shape (rows, rows), is the mean of xᵀ · x over inputs x.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _factor(gram[np.ix_(order, order)])
    block = len(matrix) // len(found.scale)
    left = matrix[order].astype(np.float32)
    integers = np.empty(matrix.shape, np.int16)
    low, high = limits(found.bits, symmetric=found.zero_point is None)
    for start in range(0, len(left), _STRIP):
        end = min(start + _STRIP, len(left))
        errors = np.empty((end - start, matrix.shape[1]), np.float32)
        for row in range(start, end):
            place = order[row] // block
            scale = found.scale[place]
            zero = 0 if found.zero_point is None else found.zero_point[place].astype(np.float32)
            steps = np.clip(np.rint(left[row] / scale) + zero, low, high)
            integers[order[row]] = steps
            errors[row - start] = (left[row] - (steps - zero) * scale) / factor[row, row]
            left[row + 1 : end] -= factor[row, row + 1 : end, None] * errors[row - start]
        left[end:] -= factor[start:end, end:].T @ errors
    return replace(found, chosen=integers)


def _factor(gram: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped matrix, float32; a channel that is never used is free."""
    import scipy.linalg

    damped = gram.astype(np.float64)
    strength = np.diag(damped).copy()
    unused = strength == 0
    damping = _DAMPING * (strength.mean() if strength.any() else 1.0)
    damped[np.diag_indices_from(damped)] = np.where(unused, 1.0, strength) + damping
    inverse = scipy.linalg.cho_solve((scipy.linalg.cholesky(damped, lower=True), True), np.eye(len(damped)))
    return np.asarray(scipy.linalg.cholesky(inverse, lower=False), np.float32)
