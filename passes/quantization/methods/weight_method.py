"""The protocol of methods that quantize a matrix.

A new method is a file beside this one: a frozen dataclass with a name, the statistics that it needs and a ``fit``; an
entry in `METHODS` (`methods/__init__.py`); and its name in the option ``method`` of the passes that may use it.
"""

from __future__ import annotations

import abc
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.observers import Observer, unusable_statistic
from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.passes.quantization._blocks import BlockFormat, QuantizedBlocks


@dataclass(frozen=True)
class WeightMethod(abc.ABC):
    """Choice of the scales, zero points and integers of a matrix."""

    name: ClassVar[str]
    """Value of the option ``method``."""
    statistics: ClassVar[tuple[type[Observer], ...]] = ()
    """Statistics of the activation of a MatMul that ``fit`` needs."""

    format: BlockFormat

    @abc.abstractmethod
    def fit(self, matrix: np.ndarray, activation: ir.Value | None = None) -> QuantizedBlocks:
        """Quantize a finite float32 matrix of shape (rows, columns).

        ``activation`` has the statistics that the method asks for; ValueError if one is missing.
        """

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why the matrix of a site cannot be quantized yet; None if it can."""
        # Large statistics are dropped once they are used: the result, not they, must be there when the pass runs.
        if self._key in self._cache(site):
            return None
        reasons = (unusable_statistic(site.data, kind, f"{self.name} needs") for kind in self.statistics)
        return next((reason for reason in reasons if reason is not None), None)

    def blocks(self, site: MatMulSite) -> QuantizedBlocks:
        """Result of ``fit`` for the matrix of a site, computed once: copies of a model share it."""
        cache = self._cache(site)
        if self._key not in cache:
            cache[self._key] = self.fit(site.tensor.numpy(), site.data)
        return cast("QuantizedBlocks", cache[self._key])

    @property
    def _key(self) -> str:
        return repr(self)

    def _cache(self, site: MatMulSite) -> MutableMapping[str, Any]:
        # Copies of a model share their tensors, not their values. A result that depends on statistics belongs to the
        # value: another copy, after other passes, may compute with other activations.
        return site.weight.meta if self.statistics else site.tensor.meta
