"""Lower two or three layers instead of many, and write the others as copies.

A stack of equal layers (an `nn.ModuleList` whose members differ in nothing but their weights and their number) traces
to equal subgraphs. So the stack is cut to its first two layers for the trace (three, if the first is unlike the
others); in the graph, the last of them shows how layer *i* follows from layer *i - 1*, and every further layer is
written as a copy of it, reading its own weights::

    x -> layer 0 -> layer 1 -> y                      what is traced
    x -> layer 0 -> layer 1 -> copy 2 … copy n -> y   what is returned

A layer's cache goes the same way: inputs `past_key_values.1.key` and outputs `present.1.key` of the last traced layer
are repeated with the numbers of the others.

Whatever does not fit (layers that differ, results of inner layers read from outside) gives None, and the caller traces
the whole model. The numeric check against the original covers what is written here like everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from planish.optimizer.graph import NAME_SCOPES

_FEWEST = 5
"""Stacks shorter than this are traced whole: nothing would be gained."""


_COMMUTATIVE = frozenset({"Add", "Mul"})
"""The exporter writes sums of sizes in either order."""


@dataclass(frozen=True)
class Stack:
    """A list of equal layers inside a module."""

    path: str
    """Path of the list from the root of the module."""
    depth: int
    """Number of layers in it."""
    traced: int
    """How many of them are traced."""

    def layer(self, index: int) -> str:
        """Path of one layer."""
        return f"{self.path}.{index}"


def find_stacks(module: Any, least: int = 2) -> list[Stack]:
    """The lists of equal layers in ``module`` that are worth cutting; none of them lies inside another.

    At least ``least`` layers are traced: three where the first layer also computes what all of them share.
    """
    import torch

    lists = [
        (path, [_describe(layer) for layer in child])
        for path, child in module.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) >= _FEWEST
    ]
    stacks = [
        Stack(path, len(layers), max(least, 2 if layers[0] == layers[1] else 3))
        for path, layers in lists
        if all(layer == layers[1] for layer in layers[2:])
    ]
    return [s for s in stacks if not any(s.path.startswith(f"{other.path}.") for other in stacks)]


def _describe(layer: Any) -> list[tuple[str, str, object]]:
    """Everything about a layer that tracing can see, except values of weights and the layer's own number."""
    return [
        (name, type(module).__qualname__, sorted(_facts(module).items(), key=lambda item: item[0]))
        for name, module in layer.named_modules()
    ]


def _facts(module: Any) -> dict[str, object]:
    simple = {
        key: repr(value)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | list | None | dict)
        and not key.startswith("_")
        and key not in ("layer_idx", "layer_id", "layer_index", "training")
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in module._parameters.items() if tensor is not None}
    values = {name: _value(tensor) for name, tensor in module._buffers.items() if tensor is not None}
    return simple | shapes | values


def _value(buffer: Any) -> object:
    """Shape and content of a buffer: unlike parameters, buffers are not read from the checkpoint by name."""
    return (tuple(buffer.shape), b"" if buffer.is_meta else buffer.detach().cpu().numpy().tobytes())


@contextmanager
def cut(module: Any, stacks: Sequence[Stack]) -> Iterator[None]:
    """Inside, each stack has only the layers that are traced."""
    places = [(module.get_submodule(path), name) for path, _, name in (s.path.rpartition(".") for s in stacks)]
    whole = [getattr(parent, name) for parent, name in places]
    for (parent, name), layers, stack in zip(places, whole, stacks, strict=True):
        setattr(parent, name, layers[: stack.traced])
    try:
        yield
    finally:
        for (parent, name), layers in zip(places, whole, strict=True):
            setattr(parent, name, layers)


def grow(model: ir.Model, stack: Stack, prefix: str = "module.") -> bool:
    """Write the layers that were cut; False, with the graph as it was, if its layers do not repeat.

    A stack that the graph does not use (the encoder's, in a graph of the decoder) is as it should be.
    """
    graph = model.graph
    paths = [prefix + stack.layer(index) for index in range(stack.depth)]
    layers = [_nodes_of(graph, path) for path in paths[: stack.traced]]
    last = paths[stack.traced - 1]
    if not any(layers):
        return True
    sources = _sources(layers[-2], layers[-1], paths[stack.traced - 2], last)
    if sources is None or not _closed(graph, layers):
        return False
    template = layers[-1]
    readers = _outside_readers(template)
    previous = template
    for index in range(stack.traced, stack.depth):
        previous = _copy_layer(graph, template, sources, previous, last, paths[index], index)
        _add_cache_outputs(graph, template, previous, index - stack.traced + 1)
    _hand_over(graph, template, previous, readers)
    for border in (graph.inputs, graph.outputs):
        border[:] = sorted(border, key=lambda value: _numbered(value) or (-1, ""))
    return True


def _nodes_of(graph: ir.Graph, path: str) -> list[ir.Node]:
    return [node for node in graph if f"'{path}'" in node.metadata_props.get(NAME_SCOPES, "")]


def _closed(graph: ir.Graph, layers: Sequence[Sequence[ir.Node]]) -> bool:
    """Whether the layer before the last traced one is read only by itself, by the last one, and as a cache."""
    readers = {id(node) for node in (*layers[-2], *layers[-1])}
    outputs = [value for node in layers[-2] for value in node.outputs]
    if any(value.is_graph_output() and _numbered(value) is None for value in outputs):
        return False
    return all(id(use.node) in readers for value in outputs for use in value.uses())


_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(.+)")


def _numbered(value: ir.Value | None) -> tuple[int, str] | None:
    """Layer and kind of an input or output that belongs to the cache."""
    match = None if value is None else _CACHE.fullmatch(value.name or "")
    return None if match is None else (int(match[2]), f"{match[1]}.{{}}.{match[3]}")


_Source = tuple[str, int, int]
"""Where an input comes from: ("inner" or "previous", node, output), ("own", …) a weight, ("cache", …) an input of the
cache, or ("global", …)."""


def _sources(
    earlier: Sequence[ir.Node], later: Sequence[ir.Node], earlier_path: str, later_path: str
) -> list[list[_Source]] | None:
    """For each node and input of ``later``, where it comes from; None if it is not a copy of ``earlier``."""
    if not later or len(earlier) != len(later) or not all(map(_same_operator, earlier, later)):
        return None
    places = (_places(earlier), _places(later))
    found: list[list[_Source]] = []
    for one, other in zip(earlier, later, strict=True):
        orders = [one.inputs, one.inputs[::-1]] if other.op_type in _COMMUTATIVE else [one.inputs]
        rows = [
            [_source(a, b, places, (earlier_path, later_path)) for a, b in zip(order, other.inputs, strict=True)]
            for order in orders
        ]
        row = next(([source for source in row if source is not None] for row in rows if None not in row), None)
        if row is None:
            return None
        found.append(row)
    return found


def _copy_layer(
    graph: ir.Graph,
    template: Sequence[ir.Node],
    sources: Sequence[Sequence[_Source]],
    previous: Sequence[ir.Node],
    template_path: str,
    path: str,
    index: int,
) -> list[ir.Node]:
    """Insert, behind ``previous``, a copy of the template that reads ``previous`` and its own weights."""
    fresh: list[ir.Node] = []
    shift = index - int(template_path.rpartition(".")[2])

    def input_of(value: ir.Value | None, source: _Source) -> ir.Value | None:
        kind, node, output = source
        if kind == "own" and value is not None:
            return _weight_of(graph, value, template_path, path)
        if kind == "cache" and value is not None:
            return _cache_input(graph, value, shift)
        layer = {"inner": fresh, "previous": previous}.get(kind)
        return value if layer is None else layer[node].outputs[output]

    anchor = previous[-1]
    for node, row in zip(template, sources, strict=True):
        inputs = [input_of(value, source) for value, source in zip(node.inputs, row, strict=True)]
        fresh.append(_copy(node, inputs, template_path, path, index))
        graph.insert_after(anchor, fresh[-1])
        anchor = fresh[-1]
    return fresh


def _outside_readers(template: Sequence[ir.Node]) -> list[tuple[ir.Value, ir.Node, int]]:
    """Who reads a value of the layer from outside it, and at which input."""
    inside = {id(node) for node in template}
    values = [value for node in template for value in node.outputs]
    return [(value, use.node, use.idx) for value in values for use in value.uses() if id(use.node) not in inside]


def _hand_over(
    graph: ir.Graph,
    template: Sequence[ir.Node],
    last: Sequence[ir.Node],
    readers: Sequence[tuple[ir.Value, ir.Node, int]],
) -> None:
    """Let what read the last traced layer from outside read the last copy instead."""
    pairs = [
        pair for node, copy in zip(template, last, strict=True) for pair in zip(node.outputs, copy.outputs, strict=True)
    ]
    follower = {id(old): new for old, new in pairs}
    for value, node, index in readers:
        node.replace_input_with(index, follower[id(value)])
    for index, output in enumerate(graph.outputs):
        if id(output) in follower and _numbered(output) is None:
            new = follower[id(output)]
            output.name, new.name = new.name, output.name
            graph.outputs[index] = new


def _cache_input(graph: ir.Graph, value: ir.Value, shift: int) -> ir.Value:
    """The input of the cache that a later layer has where the template has ``value``."""
    layer, kind = _numbered(value) or (0, "")
    name = kind.format(layer + shift)
    found = next((known for known in graph.inputs if known.name == name), None)
    if found is None:
        found = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.inputs.append(found)
    return found


def _add_cache_outputs(graph: ir.Graph, template: Sequence[ir.Node], copy: Sequence[ir.Node], shift: int) -> None:
    """Let a copied layer give its cache as the template does."""
    for node, twin in zip(template, copy, strict=True):
        for value, other in zip(node.outputs, twin.outputs, strict=True):
            numbered = _numbered(value) if value.is_graph_output() else None
            if numbered is not None:
                other.name = numbered[1].format(numbered[0] + shift)
                graph.outputs.append(other)


def _places(nodes: Sequence[ir.Node]) -> Mapping[int, tuple[int, int]]:
    return {id(value): (i, j) for i, node in enumerate(nodes) for j, value in enumerate(node.outputs)}


def _same_operator(one: ir.Node, other: ir.Node) -> bool:
    return (
        one.op_identifier() == other.op_identifier()
        and len(one.inputs) == len(other.inputs)
        and len(one.outputs) == len(other.outputs)
        and _attributes(one) == _attributes(other)
    )


def _attributes(node: ir.Node) -> dict[str, str]:
    def text(attribute: ir.Attr) -> str:
        tensor = attribute.as_tensor() if attribute.type is ir.AttributeType.TENSOR else None
        return str(attribute.value) if tensor is None else f"{tensor.dtype}{tensor.shape}{tensor.tobytes()!r}"

    return {name: text(attribute) for name, attribute in node.attributes.items()}


def _source(
    earlier: ir.Value | None,
    later: ir.Value | None,
    places: tuple[Mapping[int, tuple[int, int]], Mapping[int, tuple[int, int]]],
    paths: tuple[str, str],
) -> _Source | None:
    """Where ``later`` comes from, given that ``earlier`` stands at the same input one layer before."""
    if id(later) in places[1]:
        place = places[1][id(later)]
        return ("inner", *place) if places[0].get(id(earlier)) == place else None
    if id(later) in places[0]:
        return ("previous", *places[0][id(later)])
    if earlier is later:
        return ("global", 0, 0)
    caches = (_numbered(earlier), _numbered(later))
    if caches[0] is not None and caches[1] is not None:
        return ("cache", 0, 0) if caches[1] == (caches[0][0] + 1, caches[0][1]) else None
    if _same_length(earlier, later):
        return ("global", 0, 0)
    names = [value.name or "" if value is not None else "" for value in (earlier, later)]
    if names[1].startswith(f"{paths[1]}.") and names[0] == names[1].replace(paths[1], paths[0], 1):
        return ("own", 0, 0)
    return None


def _same_length(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are the same arithmetic on the sizes of two layers' caches, which are equally long."""
    makers = [None if value is None else value.producer() for value in (one, other)]
    if makers[0] is None or makers[1] is None or not _same_operator(makers[0], makers[1]):
        return False
    caches = [_numbered(node.inputs[0]) if node is not None and node.inputs else None for node in makers]
    if makers[0].op_type == "Shape" and caches[0] is not None and caches[1] is not None:
        return caches[0][1] == caches[1][1]
    inputs = list(zip(makers[0].inputs, makers[1].inputs, strict=True))
    return bool(inputs) and all(a is b or _same_length(a, b) for a, b in inputs)


def _copy(node: ir.Node, inputs: Sequence[ir.Value | None], old: str, new: str, index: int) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{node.name}_layer{index}",
        metadata_props={key: text.replace(old, new) for key, text in node.metadata_props.items()},
    )
    for ours, theirs in zip(copy.outputs, node.outputs, strict=True):
        ours.name, ours.shape, ours.type = f"{theirs.name}_layer{index}", theirs.shape, theirs.type
    return copy


def _weight_of(graph: ir.Graph, value: ir.Value, old: str, new: str) -> ir.Value:
    """The initializer of another layer that corresponds to ``value``; its tensor comes when weights are bound."""
    name = (value.name or "").replace(old, new, 1)
    if name not in graph.initializers:
        fresh = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        graph.register_initializer(fresh)
    return graph.initializers[name]
