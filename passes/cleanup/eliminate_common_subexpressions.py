"""Compute equal things once.

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
    """Let nodes with equal operator, inputs and attributes share one result. Built on the pass of onnx_ir."""

    name: ClassVar[str] = "eliminate-common-subexpressions"

    limit: Annotated[int, Ge(0)] = 64
    """Elements up to which constant attributes are compared."""

    def call(self, model: ir.Model) -> PassResult:
        """Share, in the main graph; what is drawn at random is drawn as often as before."""
        share = common.CommonSubexpressionEliminationPass(size_limit=self.limit)
        with _library.hidden([node for node in model.graph if is_random(node)]):
            return _library.run(model, share)
