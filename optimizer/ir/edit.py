"""Edits of a graph that onnx_ir does not offer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES as NAME_SCOPES
from planish.optimizer.ir.graph import shape_of, subgraphs_of

_PLAIN_INITIALIZERS = 4


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Register a constant under ``name`` and return its value. A name that is taken gets a suffix."""
    taken = {value.name for value in graph.inputs}
    # An initializer with the name of an input would become its default value.
    while name in graph.initializers or name in taken:
        name = f"{name}_"
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    value = ir.Value(name=name, shape=shape_of(tensor), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def name_nodes(nodes: Iterable[ir.Node], prefix: str) -> None:
    """Name new nodes, and their first outputs, by operator and order.

    Default names of onnx_ir depend on earlier edits of the graph; a build from a lock must reproduce the names.
    """
    for index, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{prefix}_{node.op_type}_{index}"


def rename_duplicates(graph: ir.Graph, outer: frozenset[str] = frozenset()) -> None:
    """Rename values that have the name of an earlier value of this graph or of an enclosing graph.

    Names of inputs, constants and outputs stay, since applications use them.
    """
    names = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())} | outer
    results = {value.name for value in graph.outputs}
    for node in graph:
        for subgraph in subgraphs_of(node):
            rename_duplicates(subgraph, frozenset(names))
        for value in node.outputs:
            # A graph output keeps its name: the other value gets the suffix, even if it is defined first.
            while value.name and (value.name in names or (value.name in results and not value.is_graph_output())):
                value.name = f"{value.name}_"
            names.add(value.name or "")


def copy_location(source: ir.Node, *nodes: ir.Node) -> None:
    """Copy the source location (PyTorch module) of ``source`` to new nodes, if it has one."""
    for node in nodes:
        if NAME_SCOPES in source.metadata_props:
            node.metadata_props[NAME_SCOPES] = source.metadata_props[NAME_SCOPES]


def replace_value(old: ir.Value, new: ir.Value, suffix: str) -> None:
    """Replace ``old`` by ``new``, which takes its name, type, shape and calibration statistics; ``old`` gets a
    suffix."""
    # meta carries the calibration statistics: later quantization passes look them up at the new value.
    new.shape, new.type = old.shape, old.type
    new.meta.update(old.meta)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}_{suffix}", old.name


def remove_dead(graph: ir.Graph | ir.Function, node: ir.Node) -> None:
    """Remove ``node`` of ``graph`` if its outputs are unused, then the producers and constants that only it used.

    These may be in the enclosing graphs.
    """
    pending = [node] if node.graph is graph else []
    while pending:
        current = pending.pop()
        if current.graph is None or any(out.uses() or out.is_graph_output() for out in current.outputs):
            continue
        read = [value for value in current.inputs if value is not None]
        # Inputs are collected before the removal, which detaches the node from them.
        current.graph.remove(current, safe=True)
        pending += [source for value in read if (source := value.producer()) is not None]
        for value in read:
            if isinstance(value.graph, ir.Graph):
                forget_unread(value.graph, [value])


def forget_unread(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Remove those of ``values`` that are unused constants of ``graph``.

    A constant that is also a graph input stays: it is the default value of that input.
    """
    for value in list(values):
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        if graph.initializers.get(value.name or "") is value:
            del graph.initializers[value.name or ""]


def allow_plain_initializers(model: ir.Model) -> None:
    """Raise the IR version to 4, the first that permits a constant which is no input, if the model has one."""
    plain = any(not value.is_graph_input() for graph in model.graphs() for value in graph.initializers.values())
    if plain and model.ir_version < _PLAIN_INITIALIZERS:
        model.ir_version = _PLAIN_INITIALIZERS


def rows_for(query: ir.Value, mask: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """An attention mask with one row per query, and the nodes that compute it (none if the mask has these rows).

    ``query`` has shape (batch, heads, queries, size); the rows of the mask are its second to last axis.
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
