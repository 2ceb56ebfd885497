"""Compute equal expressions once.

Before:  a = Relu (x);  b = Relu (x);  r = Add (a, b)
After:   a = Relu (x);  r = Add (a, a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common
from annotated_types import Ge

from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.optimizer.ir.graph import is_random
from planish.passes.cleanup import _library


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Share the results of nodes with equal operator, inputs and attributes. Built on the pass of onnx_ir."""

    name: ClassVar[str] = "eliminate-common-subexpressions"

    limit: Annotated[int, Ge(0)] = 64
    """Maximum elements of constant attributes that are compared."""

    def call(self, model: ir.Model) -> PassResult:
        """Run on the main graph, without random operators."""
        share = common.CommonSubexpressionEliminationPass(size_limit=self.limit)
        with _library.hidden([node for node in model.graph if is_random(node)]):
            return _library.run(model, share)
