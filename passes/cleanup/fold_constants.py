"""Compute once, now, what depends on nothing but constants.

Before:  a = Constant <value_ints=[2]> ();  b = Constant <value_ints=[3]> ();  s = Mul (a, b);  r = Reshape (x, s)
After:   r = Reshape (x, s)          (s is an initializer that holds 6)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common
from annotated_types import Ge
from onnxscript import optimizer

from planish.optimizer.base import Pass
from planish.optimizer.graph import graphs_of
from planish.passes.cleanup import _library


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate constant expressions, but never into something bigger.

    1. A result of at most ``limit`` elements replaces its expression.
    2. A larger result replaces it only if it is not larger than what it was computed from (a transposed weight).
    3. Constants that are read become initializers, so that other passes find them in one place.

    Built on the folder of onnxscript, which also resolves shape arithmetic on known dimensions.
    """

    name: ClassVar[str] = "fold-constants"

    limit: Annotated[int, Ge(0)] = 1024
    """Elements that a result may have and still replace a smaller expression."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold, then lift what is left of `Constant` nodes."""

        def fold(model: ir.Model) -> ir.passes.PassResult:
            known = _shapes(model)
            found = optimizer.fold_constants_ir(
                model,
                onnx_shape_inference=True,
                input_size_limit=max(8192, self.limit),
                output_size_limit=self.limit,
            )
            learned = _shapes(model) != known  # the folder does not count what it infers as a change
            return ir.passes.PassResult(model, found.modified or learned)

        lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        return _library.run(model, fold, lift)


def _shapes(model: ir.Model) -> list[str]:
    """Type and shape of every value that a node gives."""
    values = [value for graph in graphs_of(model) for node in graph for value in node.outputs]
    return [f"{value.type}{value.shape}" for value in values]
