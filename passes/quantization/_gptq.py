"""Round a matrix row by row, and let the rows that are still to come make up for the error of each.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers": rows are taken
in order of how strong their channel is, and scales of blocks are found beforehand, so that they stay where they are
(what the authors' code calls act-order and static groups).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from planish.optimizer.interfaces.observers import GramObserver, statistic_of
from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization._rounding import Blocks, blocks_of, limits, strips

AnyMethod = Literal["nearest", "mse", "hqq", "gptq"]

_DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
_ROWS = 128
"""Rows whose errors are handed on together."""


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded; what was found for one is kept beside it, since it is asked for in every trial.

    What depends on the matrix alone is kept with its tensor, which copies of a model share; what depends on what was
    seen as well, with its value.
    """

    bits: int
    block: int
    symmetric: bool
    method: AnyMethod

    def not_ready(self, site: MatMulSite) -> str | None:
        """Why a matrix cannot be rounded so; nothing if it can."""
        if self.method != "gptq" or self._key in self._kept(site):
            return None
        found = statistic_of(site.data, GramObserver)
        if found is None:
            return "nothing was seen of its activation: gptq needs calibration data"
        return None if found.finite else "its activation holds NaN or infinity"

    def consume(self, site: MatMulSite) -> None:
        """Find the integers of a matrix for gptq, if its activation has just been seen."""
        if self.method == "gptq" and self.not_ready(site) is None:
            self.blocks(site)

    def blocks(self, site: MatMulSite) -> Blocks:
        """Scales and, for gptq, integers of a matrix; ValueError if it is not ready."""
        kept = self._kept(site)
        if self._key not in kept:
            kept[self._key] = self._found(site)
        return cast("Blocks", kept[self._key])

    def _kept(self, site: MatMulSite) -> MutableMapping[str, Any]:
        return site.weight.meta if self.method == "gptq" else site.tensor.meta

    @property
    def _key(self) -> str:
        return repr(self)

    def _found(self, site: MatMulSite) -> Blocks:
        matrix = site.tensor.numpy()
        if self.method != "gptq":
            return blocks_of(matrix, self.bits, self.block, symmetric=self.symmetric, method=self.method)
        gram = statistic_of(site.data, GramObserver)
        if gram is None:
            raise ValueError(f"{site.data.name!r} was not seen")
        scaled = blocks_of(matrix, self.bits, self.block, symmetric=self.symmetric, method="mse")
        return gptq(matrix, gram.mean, scaled)


def gptq(matrix: np.ndarray, gram: np.ndarray, found: Blocks) -> Blocks:
    """``found`` with integers that keep the product of inputs and ``matrix`` instead of the matrix itself.

    ``matrix`` has shape (rows, columns); ``gram``, shape (rows, rows), is the mean of xᵀ · x over inputs x.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _factor(gram[np.ix_(order, order)])
    integers = np.empty(matrix.shape, found.dtype)
    for strip in strips(matrix):
        zero = None if found.zero_point is None else found.zero_point[:, strip].astype(np.float32)
        part = replace(found, scale=found.scale[:, strip], zero_point=zero)
        integers[order, strip] = _chosen(matrix[order, strip], order, factor, part)
    return replace(found, chosen=integers)


def _chosen(left: np.ndarray, order: np.ndarray, factor: np.ndarray, found: Blocks) -> np.ndarray:
    """Integers, in float, of rows in an order, shape of ``left``, which is used up."""
    block = len(left) // len(found.scale)
    low, high = limits(found.bits, symmetric=found.zero_point is None)
    integers = np.empty_like(left)
    for start in range(0, len(left), _ROWS):
        end = min(start + _ROWS, len(left))
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for row in range(start, end):
            place = order[row] // block
            scale = found.scale[place]
            zero = np.float32(0) if found.zero_point is None else found.zero_point[place]
            steps = np.clip(np.rint(left[row] / scale) + zero, low, high)
            integers[row] = steps
            errors[row - start] = (left[row] - (steps - zero) * scale) / factor[row, row]
            left[row + 1 : end] -= factor[row, row + 1 : end, None] * errors[row - start]
        left[end:] -= factor[start:end, end:].T @ errors
    return integers


def _factor(gram: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped matrix, float32; a channel that is never used is free."""
    from scipy.linalg.lapack import dpotrf, dpotri

    damped = np.array(gram, np.float64, order="F")
    strength = np.diag(damped).copy()
    unused = strength == 0
    damping = _DAMPING * (strength.mean() if strength.any() else 1.0)
    damped[np.diag_indices_from(damped)] = np.where(unused, 1.0, strength) + damping
    inverse = _succeeded(dpotri(_succeeded(dpotrf(damped, overwrite_a=1)), overwrite_c=1))  # all in place
    return np.triu(_succeeded(dpotrf(inverse, overwrite_a=1))).astype(np.float32)


def _succeeded(result: tuple[np.ndarray, int]) -> np.ndarray:
    """The matrix that a function of LAPACK gives; FloatingPointError if it could not go on."""
    found, failed = result
    if failed:
        raise FloatingPointError(f"a damped matrix of products is not positive definite: LAPACK says {failed}")
    return found
