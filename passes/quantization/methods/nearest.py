"""Round to the nearest of evenly spaced values that span the whole range of a block.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 2.1, with a range for each block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.quantization._blocks import QuantizedBlocks, fit_in_strips, parameters_of_range
from planish.passes.quantization.methods.weight_method import WeightMethod


@dataclass(frozen=True)
class Nearest(WeightMethod):
    """Keep the whole range of each block."""

    name: ClassVar[str] = "nearest"

    def fit(self, matrix: np.ndarray, activation: ir.Value | None = None) -> QuantizedBlocks:
        """Take scales and zero points from the extremes of each block."""
        return fit_in_strips(matrix, self.format, functools.partial(parameters_of_range, share=np.float32(1)))
