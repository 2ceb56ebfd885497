"""Edits of a graph that onnx_ir does not offer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES as NAME_SCOPES
from planish.optimizer.ir.graph import shape_of, subgraphs_of

_PLAIN_INITIALIZERS = 4


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Register a constant under ``name`` and return its value; a name that an input or constant has is lengthened."""
    taken = {value.name for value in graph.inputs}
    while name in graph.initializers or name in taken:
        name = f"{name}_"
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    value = ir.Value(name=name, shape=shape_of(tensor), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def name_nodes(nodes: Iterable[ir.Node], prefix: str) -> None:
    """Name new nodes, and their first outputs, by what they do and their order.

    Names that are left to onnx_ir count what happened to the graph before; a build from a lock must repeat them.
    """
    for index, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{prefix}_{node.op_type}_{index}"


def rename_duplicates(graph: ir.Graph, outer: frozenset[str] = frozenset()) -> None:
    """Give values that have the name of an earlier one, here or in the graphs around, a longer one.

    Names of inputs, constants and outputs stay: applications read them.
    """
    names = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())} | outer
    results = {value.name for value in graph.outputs}
    for node in graph:
        for subgraph in subgraphs_of(node):
            rename_duplicates(subgraph, frozenset(names))
        for value in node.outputs:
            while value.name and (value.name in names or (value.name in results and not value.is_graph_output())):
                value.name = f"{value.name}_"
            names.add(value.name or "")


def copy_location(source: ir.Node, *nodes: ir.Node) -> None:
    """Say of new nodes that they come from where ``source`` does, where that is known."""
    for node in nodes:
        if NAME_SCOPES in source.metadata_props:
            node.metadata_props[NAME_SCOPES] = source.metadata_props[NAME_SCOPES]


def replace_value(old: ir.Value, new: ir.Value, suffix: str) -> None:
    """Let ``new`` be read instead of ``old``, under its name and with its type; the old one gets a suffix.

    What was observed of the old one is known of the new one as well.
    """
    new.shape, new.type = old.shape, old.type
    new.meta.update(old.meta)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}_{suffix}", old.name


def remove_dead(graph: ir.Graph | ir.Function, node: ir.Node) -> None:
    """Remove ``node`` of ``graph`` if nothing reads it, and then whatever only it read, constants as well.

    What only it read may stand in the graphs around.
    """
    pending = [node] if node.graph is graph else []
    while pending:
        current = pending.pop()
        if current.graph is None or any(out.uses() or out.is_graph_output() for out in current.outputs):
            continue
        read = [value for value in current.inputs if value is not None]
        current.graph.remove(current, safe=True)
        pending += [source for value in read if (source := value.producer()) is not None]
        for value in read:
            if isinstance(value.graph, ir.Graph):
                forget_unread(value.graph, [value])


def forget_unread(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Remove those of ``values`` that are constants of ``graph`` and that nobody reads any more.

    A constant that is an input as well stays: without it the input could not be left out.
    """
    for value in list(values):
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        if graph.initializers.get(value.name or "") is value:
            del graph.initializers[value.name or ""]


def allow_plain_initializers(model: ir.Model) -> None:
    """Raise the IR version to the first in which a constant need not be an input as well, if there is such a one."""
    plain = any(not value.is_graph_input() for graph in model.graphs() for value in graph.initializers.values())
    if plain and model.ir_version < _PLAIN_INITIALIZERS:
        model.ir_version = _PLAIN_INITIALIZERS


def rows_for(query: ir.Value, mask: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """An attention mask with one row per query, and the nodes that make it; none if it has the rows already.

    ``query`` has shape (batch, heads, queries, size); the rows of the mask are its last axis but one.
    """
    rows = None if mask.shape is None or len(mask.shape) < 2 else mask.shape[-2]
    queries = None if query.shape is None else query.shape[-2]
    same = isinstance(rows, ir.SymbolicDim) and rows.value is not None and rows == queries
    if same or (isinstance(rows, int) and rows != 1):
        return mask, []
    count = ir.node("Shape", [query], {"start": 2, "end": 3})
    one = ir.node("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    target = ir.node("Concat", [count.outputs[0], one.outputs[0]], {"axis": 0})
    spread = ir.node("Expand", [mask, target.outputs[0]])
    return spread.outputs[0], [count, one, target, spread]
