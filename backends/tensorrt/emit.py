"""Checks of a graph before it is written for TensorRT."""

from __future__ import annotations

import onnx_ir as ir

from planish.optimizer.errors import CheckFailed
from planish.optimizer.ir.graph import graphs_of, location_of, opset_of

NEWEST_OPSET = 24
"""The newest opset that the parser of TensorRT 10.15 and 11.1 reads."""
_UNSUPPORTED = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
"""Standard operators that TensorRT's parser refuses (onnx-tensorrt, docs/operators.md)."""


def refuse_foreign(model: ir.Model) -> None:
    """CheckFailed if the graph has an operator that TensorRT's parser does not know, or a newer opset than it reads."""
    if opset_of(model) > NEWEST_OPSET:
        raise CheckFailed(f"TensorRT reads opset {NEWEST_OPSET} at most, the graph is written in {opset_of(model)}")
    for graph in graphs_of(model):
        for node in graph:
            if node.domain not in ("", "ai.onnx") or node.op_type in _UNSUPPORTED:
                raise CheckFailed(
                    f"TensorRT has no operator {node.domain or 'ONNX'}::{node.op_type}",
                    where=location_of(node),
                    advice="leave out the pass that wrote it for this target",
                )
