"""Methods that choose the scales, zero points and integers of a matrix, one a file."""

from __future__ import annotations

from planish.passes.quantization.methods.gptq import Gptq
from planish.passes.quantization.methods.hqq import Hqq
from planish.passes.quantization.methods.mse import Mse
from planish.passes.quantization.methods.nearest import Nearest
from planish.passes.quantization.methods.weight_method import WeightMethod

METHODS: dict[str, type[WeightMethod]] = {method.name: method for method in (Nearest, Mse, Hqq, Gptq)}
"""Classes of methods by the value of the option ``method``."""
