"""Remove unused nodes.

Before:  y = Relu (x);  z = Exp (x);  r = Neg (y)
After:   y = Relu (x);  r = Neg (y)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.passes.cleanup import _library


@dataclass(frozen=True)
class RemoveUnusedNodes(Pass):
    """Remove nodes, initializers, functions and opset imports that no output depends on (passes of onnx_ir)."""

    name: ClassVar[str] = "remove-unused-nodes"

    def call(self, model: ir.Model) -> PassResult:
        """Run on every graph."""
        return _library.run(
            model,
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        )
