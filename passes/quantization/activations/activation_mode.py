"""The protocol of activation modes: where the activations of 8-bit MatMuls get their scales.

A new mode is a file beside this one, a class with the statistics that it needs and the nodes that it writes; an entry
in the table of `quantize-int8`; and its name in the option ``activations``.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np

from planish.optimizer.interfaces.observers import Observer
from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization.activations.writer import GraphWriter

LEVELS = 127
"""Steps of 8 bits on each side of zero."""
SMALLEST_SCALE = 1e-30
"""Lower limit of the largest magnitude of a row: a row of zeros stays zeros instead of becoming NaN."""


class ActivationMode(abc.ABC):
    """Quantization of an activation, and the form of the MatMul that reads it."""

    statistics: ClassVar[tuple[type[Observer], ...]] = ()
    """Statistics of each activation that the mode needs."""

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why the activation of a site cannot be quantized yet; None if it can."""
        return None

    @abc.abstractmethod
    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """Values of an activation that the MatMul of a site computes with, float32, same shape as ``data``."""

    @abc.abstractmethod
    def rewrite(self, writer: GraphWriter, site: MatMulSite) -> None:
        """Replace the MatMul of a site by its 8-bit form."""


def symmetric_steps(data: np.ndarray, axis: int | None) -> np.ndarray:
    """Values of ``data`` in 127 steps up to the largest magnitude along ``axis``, of all entries if it is None."""
    step = np.maximum(np.abs(data).max(axis=axis, keepdims=True), SMALLEST_SCALE) / LEVELS
    return np.asarray(np.rint(data / step) * step, np.float32)
