"""Running a pass of onnx_ir or onnxscript, and finding out by looking what it removed."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from planish.optimizer.base import PassResult
from planish.optimizer.graph import graphs_of, location_of


def run(model: ir.Model, *steps: Callable[[ir.Model], ir.passes.PassResult]) -> PassResult:
    """Run library passes in order; the sites are the nodes that are gone afterwards."""
    nodes = [(node, location_of(node)) for graph in graphs_of(model) for node in graph]
    modified = False
    for step in steps:
        modified = step(model).modified or modified
    gone = [location for node, location in nodes if node.graph is None]
    return PassResult(model, modified or bool(gone), sites=gone)
