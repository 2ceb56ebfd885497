"""Running a pass of onnx_ir or onnxscript: keep from it what it gets wrong, and find out by looking what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import PassResult
from planish.optimizer.ir.edit import allow_plain_initializers
from planish.optimizer.ir.graph import graphs_of, location_of
from planish.optimizer.ir.shape_inference import infer_shapes, quiet_libraries

_MADE_UP = "unk__"
"""How the inference of ONNX begins the names of dimensions that it knows nothing of."""


def run(model: ir.Model, *steps: Callable[[ir.Model], object]) -> PassResult:
    """Run library passes in order; the sites are the nodes that are gone afterwards.

    What the passes say of themselves is not asked: some add types and shapes, or cut empty inputs, and call it nothing.
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
    """Keep nodes from a library: meanwhile each is of a domain of its own, where there is nothing to know of it."""
    domains = [(node, node.domain) for node in nodes]
    for index, (node, _) in enumerate(domains):
        node.domain = f"planish.hidden.{index}"
    try:
        yield
    finally:
        for node, domain in domains:
            node.domain = domain


def infer_again(model: ir.Model) -> None:
    """Find shapes again: what an earlier inference called by a name that it made up may be known by now."""
    for value in (value for graph in model.graphs() for node in graph for value in node.outputs):
        if value.shape is not None and not value.is_graph_output():
            value.shape = ir.Shape([None if _is_made_up(dim) else dim for dim in value.shape])
    infer_shapes(model)


def _is_made_up(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and (dim.value or "").startswith(_MADE_UP)


def _detach(before: Iterable[ir.Graph], model: ir.Model) -> None:
    """Let graphs that left the model read nothing: a branch that is not taken would keep alive what it read."""
    living = {id(graph) for graph in model.graphs()}
    for graph in before:
        if id(graph) in living:
            continue
        graph.outputs.clear()
        for node in graph:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def _facts(model: ir.Model) -> tuple[list[object], list[object]]:
    """All that a pass can change of a model, and the objects whose identities it names (kept: no other gets them)."""
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
            made = [_value_facts(value) for value in node.outputs]
            facts.append((node.name, node.domain, node.op_type, *map(id, parts), made))
            alive += [*parts, *node.outputs]
    return facts, alive


def _value_facts(value: ir.Value) -> tuple[object, ...]:
    return id(value), value.name, repr(value.type), None if value.shape is None else tuple(value.shape)
