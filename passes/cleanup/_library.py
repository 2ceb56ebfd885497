"""Passes of onnx_ir and onnxscript, with their defects excluded and their effects determined by comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import PassResult
from planish.optimizer.ir.edit import allow_plain_initializers
from planish.optimizer.ir.graph import graphs_of, location_of
from planish.optimizer.ir.shape_inference import infer_shapes, quiet_libraries

_MADE_UP = "unk__"
"""Prefix of the names that ONNX inference gives to unknown dimensions."""


def run(model: ir.Model, *steps: Callable[[ir.Model], object]) -> PassResult:
    """Run library passes in order; the sites are the removed nodes.

    The passes' own reports are not used: some add types and shapes, or remove empty inputs, and report no change.
    """
    nodes = [(node, location_of(node)) for graph in graphs_of(model) for node in graph]
    graphs = list(model.graphs())
    before, _alive = _facts(model)
    with quiet_libraries():
        for step in steps:
            step(model)
    _detach(graphs, model)
    allow_plain_initializers(model)
    gone = [location for node, location in nodes if node.graph is None]
    return PassResult(model, _facts(model)[0] != before, sites=gone)


@contextmanager
def hidden(nodes: Iterable[ir.Node]) -> Iterator[None]:
    """Hide nodes from a library in the block, by an unknown domain."""
    domains = [(node, node.domain) for node in nodes]
    for index, (node, _) in enumerate(domains):
        node.domain = f"planish.hidden.{index}"
    try:
        yield
    finally:
        for node, domain in domains:
            node.domain = domain


def infer_again(model: ir.Model) -> None:
    """Infer shapes again: dimensions with invented names may be known now."""
    for value in (value for graph in model.graphs() for node in graph for value in node.outputs):
        if value.shape is not None and not value.is_graph_output():
            value.shape = ir.Shape([None if _is_made_up(dim) else dim for dim in value.shape])
    infer_shapes(model)


def _is_made_up(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and (dim.value or "").startswith(_MADE_UP)


def _detach(before: Iterable[ir.Graph], model: ir.Model) -> None:
    """Detach removed subgraphs from outer values, which a removed branch would otherwise keep alive."""
    living = {id(graph) for graph in model.graphs()}
    for graph in before:
        if id(graph) in living:
            continue
        graph.outputs.clear()
        for node in graph:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def _facts(model: ir.Model) -> tuple[list[object], list[object]]:
    """All properties of a model that a pass can change, with the objects whose identities it holds."""
    facts: list[object] = [model.ir_version, dict(model.opset_imports), list(model.functions)]
    alive: list[object] = []
    for graph in graphs_of(model):
        weights = list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
        values = [*graph.inputs, *weights, *graph.outputs]
        facts.append([_value_facts(value) for value in values])
        facts.append([id(value.const_value) for value in weights])
        alive += [*values, *(value.const_value for value in weights)]
        for node in graph:
            parts = [node, *node.inputs, *node.attributes.values()]
            outputs = [_value_facts(value) for value in node.outputs]
            facts.append((node.name, node.domain, node.op_type, *map(id, parts), outputs))
            alive += [*parts, *node.outputs]
    return facts, alive


def _value_facts(value: ir.Value) -> tuple[object, ...]:
    return id(value), value.name, repr(value.type), None if value.shape is None else tuple(value.shape)
