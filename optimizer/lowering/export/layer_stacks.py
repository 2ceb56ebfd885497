"""Tracing of the first layers of a deep stack; the other layers are copied in the graph.

Layers of a stack (an `nn.ModuleList`) that differ only in weights and index trace to equal subgraphs. Their kinds often
repeat with a *period*: one, if all are equal; two, if window and full attention alternate; perhaps after a few other
layers (dense ones before experts). The stack is cut to its beginning and two periods for the trace. In the graph, the
second period shows how a period follows from the one before. Every further period is a copy of it with its own weights.
For a period of two::

    x -> layer 0, 1 -> layer 2, 3 -> y                          what is traced
    x -> layer 0, 1 -> layer 2, 3 -> copies 4, 5 … n - 1 -> y   what is returned

The beginning is chosen so that whole periods remain. Caches are copied likewise: inputs `past_key_values.3.key` and
outputs `present.3.key` of the last traced period are repeated with the indices of the others.

If a stack does not fit (kinds that do not repeat, inner results read from outside), functions return None or False, and
the caller traces the whole model. The numeric check against the original covers copied layers as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES
from planish.optimizer.lowering.export.torch_export import PREFIX

_FEWEST = 5
"""Minimum layers of a stack; shorter ones are traced completely."""
_MOST = 0.75
"""Maximum share of traced layers; above it the stack is traced completely."""

_COMMUTATIVE = frozenset({"Add", "Mul"})
"""The exporter writes sums of sizes in either order."""


@dataclass(frozen=True)
class Stack:
    """A list of layers inside a module whose kinds repeat."""

    path: str
    """Path of the list from the root of the module."""
    depth: int
    """Number of layers in it."""
    traced: int
    """Number of traced layers: the beginning, and two periods."""
    period: int
    """Period of the kinds; it divides the number of copied layers."""

    def __post_init__(self) -> None:
        if self.traced < 2 * self.period or (self.depth - self.traced) % self.period:
            raise ValueError(f"{self} does not end with whole periods")

    def number_of(self, text: str) -> int | None:
        """The index of the layer in a parameter's name or in a node's scopes."""
        match = self._layer.search(text)
        return None if match is None else int(match[1])

    def shifted(self, text: str, by: int) -> str:
        """A parameter's name or a node's scopes with the layer index increased by ``by``."""
        return self._layer.sub(lambda match: f"{PREFIX}{self.path}.{int(match[1]) + by}", text)

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![^']){re.escape(PREFIX + self.path)}\.(\d+)(?![^'.])")


def find_stacks(module: Any, *, sharing: bool = False) -> list[Stack]:
    """The lists in ``module`` whose layers repeat and that are worth cutting; none of them is inside another.

    With ``sharing``, the first layer of each kind also computes values that others of its kind read: it is not used as
    an example of a period.
    """
    import torch

    lists = [
        (path, _kinds(module, child))
        for path, child in module.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) >= _FEWEST
    ]
    stacks = [stack for path, kinds in lists if (stack := _shortest(path, kinds, sharing=sharing)) is not None]
    return [s for s in stacks if not any(s.path.startswith(f"{other.path}.") for other in stacks)]


def _shortest(path: str, kinds: Sequence[_Kind], *, sharing: bool) -> Stack | None:
    """The stack with the smallest number of traced layers for these kinds; None if they do not repeat often enough."""
    depth = len(kinds)
    makes = [kind.make for kind in kinds]
    shown = 1 + max(makes.index(make) for make in makes) if sharing else 0
    stacks = []
    for period in range(1, depth // 3 + 1):
        differing = [index for index in range(depth - period) if kinds[index] != kinds[index + period]]
        beginning = max(shown, differing[-1] + 1 if differing else 0)
        # The copied layers must be whole periods: the beginning takes the rest.
        beginning += (depth - beginning) % period
        stacks.append(Stack(path, depth, beginning + 2 * period, period))
    # min returns the first: of equal costs, the shortest period.
    best = min(stacks, key=lambda stack: stack.traced)
    return best if best.traced <= _MOST * depth else None


@dataclass(frozen=True)
class _Kind:
    """All properties of a layer that affect the trace, except weight values and the layer's index."""

    make: tuple[tuple[str, str], ...]
    """Names and classes of the layer's modules."""
    facts: tuple[object, ...]
    """Settings of these modules."""
    listed: tuple[str, ...]
    """Entries of the configuration for the layer."""


def _kinds(root: Any, layers: Any) -> list[_Kind]:
    text_config = getattr(getattr(root, "config", None), "get_text_config", None)
    settings = {} if text_config is None else vars(text_config())
    listed = [items for items in settings.values() if isinstance(items, list | tuple) and len(items) == len(layers)]
    return [
        _Kind(
            tuple((name, type(module).__qualname__) for name, module in layer.named_modules()),
            tuple(sorted(facts_of(module).items(), key=lambda item: item[0]) for module in layer.modules()),
            tuple(repr(items[index]) for items in listed),
        )
        for index, layer in enumerate(layers)
    ]


def facts_of(module: Any) -> dict[str, object]:
    """Properties of one module that affect the trace: settings, shapes of its parameters, contents of its buffers."""
    simple = {
        key: repr(value)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | list | None | dict)
        and not key.startswith("_")
        # These differ in every layer without an effect on the trace.
        and key not in ("layer_idx", "layer_id", "layer_index", "training")
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in module._parameters.items() if tensor is not None}
    values = {name: _value(tensor) for name, tensor in module._buffers.items() if tensor is not None}
    return simple | shapes | values


def _value(buffer: Any) -> object:
    """Shape and content of a buffer: unlike parameters, buffers are not bound by name from the checkpoint."""
    return (tuple(buffer.shape), b"" if buffer.is_meta else buffer.detach().cpu().numpy().tobytes())


@contextmanager
def cut(module: Any, stacks: Sequence[Stack]) -> Iterator[None]:
    """Cut each stack to its traced layers in the block."""
    places = [(module.get_submodule(path), name) for path, _, name in (s.path.rpartition(".") for s in stacks)]
    whole = [getattr(parent, name) for parent, name in places]
    for (parent, name), layers, stack in zip(places, whole, stacks, strict=True):
        setattr(parent, name, layers[: stack.traced])
    try:
        yield
    finally:
        for (parent, name), layers in zip(places, whole, strict=True):
            setattr(parent, name, layers)


def grow(model: ir.Model, stack: Stack) -> bool:
    """Copy the omitted layers in the graph; False, with the graph unchanged, if its periods do not repeat.

    A stack that the graph does not use (the encoder's, in a graph of the decoder) is skipped.
    """
    graph = model.graph
    layers = [_layer_of(stack, node) for node in graph]
    if all(layer is None for layer in layers):
        return True
    # The last traced period is the template; the one before shows what it reads from its predecessor.
    last = range(stack.traced - stack.period, stack.traced)
    template = [node for node, layer in zip(graph, layers, strict=True) if layer is not None and layer in last]
    earlier = [
        node for node, layer in zip(graph, layers, strict=True) if layer is not None and layer + stack.period in last
    ]
    sources = _sources(earlier, template, stack)
    if sources is None or not _closed(earlier, template):
        return False
    readers = _outside_readers(template)
    previous = template
    for shift in range(stack.period, stack.depth - stack.traced + 1, stack.period):
        previous = _copy_period(graph, stack, template, sources, previous, shift)
        _add_cache_outputs(graph, template, previous, shift)
    _hand_over(graph, template, previous, readers)
    # Loaders expect cache tensors in the order of layers; sorted() keeps the order of all others.
    for border in (graph.inputs, graph.outputs):
        border[:] = sorted(border, key=lambda value: _numbered(value) or (-1, ""))
    return True


def _layer_of(stack: Stack, node: ir.Node) -> int | None:
    """The layer of the stack in which the exporter recorded a node."""
    return stack.number_of(node.metadata_props.get(NAME_SCOPES, ""))


def _closed(earlier: Sequence[ir.Node], later: Sequence[ir.Node]) -> bool:
    """True if the second last traced period is read only by itself, by the last one, and as a cache."""
    readers = {id(node) for node in (*earlier, *later)}
    outputs = [value for node in earlier for value in node.outputs]
    if any(value.is_graph_output() and _numbered(value) is None for value in outputs):
        return False
    return all(id(use.node) in readers for value in outputs for use in value.uses())


_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(.+)")


def _numbered(value: ir.Value | None) -> tuple[int, str] | None:
    """Layer and kind of a cache input or output."""
    match = None if value is None else _CACHE.fullmatch(value.name or "")
    return None if match is None else (int(match[2]), f"{match[1]}.{{}}.{match[3]}")


_Source = tuple[str, int, int]
"""Source of an input: ("inner" or "previous", node, output), ("own", …) a weight, ("cache", …) a cache input, or
("global", …)."""


def _sources(earlier: Sequence[ir.Node], later: Sequence[ir.Node], stack: Stack) -> list[list[_Source]] | None:
    """The source of each node input of ``later``; None if it is not a copy of ``earlier``."""
    if not later or len(earlier) != len(later) or not all(map(_same_operator, earlier, later)):
        return None
    places = (_places(earlier), _places(later))
    sources: list[list[_Source]] = []
    for one, other in zip(earlier, later, strict=True):
        # The exporter may swap the operands of equal layers.
        orders = [one.inputs, one.inputs[::-1]] if other.op_type in _COMMUTATIVE else [one.inputs]
        rows = [[_source(a, b, places, stack) for a, b in zip(order, other.inputs, strict=True)] for order in orders]
        row = next(([source for source in row if source is not None] for row in rows if None not in row), None)
        if row is None:
            return None
        sources.append(row)
    return sources


def _copy_period(
    graph: ir.Graph,
    stack: Stack,
    template: Sequence[ir.Node],
    sources: Sequence[Sequence[_Source]],
    previous: Sequence[ir.Node],
    shift: int,
) -> list[ir.Node]:
    """Insert, after ``previous``, a copy of the template for ``shift`` layers later that reads ``previous``."""
    fresh: list[ir.Node] = []

    def input_of(value: ir.Value | None, source: _Source) -> ir.Value | None:
        kind, node, output = source
        if kind == "own" and value is not None:
            return _weight_of(graph, value, stack.shifted(value.name or "", shift))
        if kind == "cache" and value is not None:
            return _cache_input(graph, value, shift)
        period = {"inner": fresh, "previous": previous}.get(kind)
        return value if period is None else period[node].outputs[output]

    anchor = previous[-1]
    for node, row in zip(template, sources, strict=True):
        inputs = [input_of(value, source) for value, source in zip(node.inputs, row, strict=True)]
        fresh.append(_copy(node, inputs, stack, shift))
        graph.insert_after(anchor, fresh[-1])
        anchor = fresh[-1]
    return fresh


def _outside_readers(template: Sequence[ir.Node]) -> list[tuple[ir.Value, ir.Node, int]]:
    """Uses of a layer's value outside of the layer."""
    inside = {id(node) for node in template}
    values = [value for node in template for value in node.outputs]
    return [(value, use.node, use.idx) for value in values for use in value.uses() if id(use.node) not in inside]


def _hand_over(
    graph: ir.Graph,
    template: Sequence[ir.Node],
    last: Sequence[ir.Node],
    readers: Sequence[tuple[ir.Value, ir.Node, int]],
) -> None:
    """Redirect outside readers of the last traced layer to the last copy."""
    pairs = [
        pair for node, copy in zip(template, last, strict=True) for pair in zip(node.outputs, copy.outputs, strict=True)
    ]
    follower = {id(old): new for old, new in pairs}
    for value, node, index in readers:
        node.replace_input_with(index, follower[id(value)])
    for index, output in enumerate(graph.outputs):
        if id(output) in follower and _numbered(output) is None:
            new = follower[id(output)]
            # The graph output keeps its public name.
            output.name, new.name = new.name, output.name
            graph.outputs[index] = new


def _cache_input(graph: ir.Graph, value: ir.Value, shift: int) -> ir.Value:
    """The cache input of a later layer that corresponds to the template's ``value``."""
    layer, kind = _numbered(value) or (0, "")
    name = kind.format(layer + shift)
    present = next((port for port in graph.inputs if port.name == name), None)
    if present is None:
        present = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.inputs.append(present)
    return present


def _add_cache_outputs(graph: ir.Graph, template: Sequence[ir.Node], copy: Sequence[ir.Node], shift: int) -> None:
    """Add the cache outputs of a copied layer."""
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
    stack: Stack,
) -> _Source | None:
    """The source of ``later``, given that ``earlier`` is the same input one period before."""
    if id(later) in places[1]:
        place = places[1][id(later)]
        return ("inner", *place) if places[0].get(id(earlier)) == place else None
    if id(later) in places[0]:
        return ("previous", *places[0][id(later)])
    if earlier is later:
        return ("global", 0, 0)
    caches = (_numbered(earlier), _numbered(later))
    if caches[0] is not None and caches[1] is not None:
        return ("cache", 0, 0) if caches[1] == (caches[0][0] + stack.period, caches[0][1]) else None
    if _same_length(earlier, later):
        return ("global", 0, 0)
    names = [value.name or "" if value is not None else "" for value in (earlier, later)]
    is_own_weight = stack.number_of(names[1]) is not None and stack.shifted(names[0], stack.period) == names[1]
    return ("own", 0, 0) if is_own_weight else None


def _same_length(one: ir.Value | None, other: ir.Value | None) -> bool:
    """True if two values are the same arithmetic on the sizes of two layers' caches, which have equal length."""
    makers = [None if value is None else value.producer() for value in (one, other)]
    if makers[0] is None or makers[1] is None or not _same_operator(makers[0], makers[1]):
        return False
    caches = [_numbered(node.inputs[0]) if node is not None and node.inputs else None for node in makers]
    if makers[0].op_type == "Shape" and caches[0] is not None and caches[1] is not None:
        return caches[0][1] == caches[1][1]
    inputs = list(zip(makers[0].inputs, makers[1].inputs, strict=True))
    return bool(inputs) and all(a is b or _same_length(a, b) for a, b in inputs)


def _copy(node: ir.Node, inputs: Sequence[ir.Value | None], stack: Stack, shift: int) -> ir.Node:
    index = (_layer_of(stack, node) or 0) + shift
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{node.name}_layer{index}",
        metadata_props={key: stack.shifted(text, shift) for key, text in node.metadata_props.items()},
    )
    for ours, theirs in zip(copy.outputs, node.outputs, strict=True):
        ours.name, ours.shape, ours.type = f"{theirs.name}_layer{index}", theirs.shape, theirs.type
    return copy


def _weight_of(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The initializer of another layer that corresponds to ``value``; its tensor is bound later."""
    if name not in graph.initializers:
        fresh = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        graph.register_initializer(fresh)
    return graph.initializers[name]
