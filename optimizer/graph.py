"""Small questions about a graph that onnx_ir does not answer. No policy lives here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from planish.optimizer.annotations import NAME_SCOPES as NAME_SCOPES
from planish.optimizer.shape_inference import follows_few

_PLAIN_INITIALIZERS = 4
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

FINITE_MASK = "planish.finite_mask"
"""Metadata key of an Attention whose mask holds finite numbers only: no query sees nothing, and no result is NaN."""
IN_FLOAT = "planish.in_float"
"""Metadata key of a product that shall not be rounded: it has the channels that stand out."""
SPELLED_OUT = "planish.spelled_out"
"""Metadata key of nodes that stand for one operator because a target runs them faster; the pass that wrote them."""


def constant_of(value: ir.Value | None, limit: int = 1 << 16) -> np.ndarray | None:
    """The array behind a constant value of at most ``limit`` elements, else None.

    Looks at initializers and at ``Constant`` nodes; the limit keeps callers from reading weights by accident. An input
    of the graph is not constant, even if it has a value when nobody gives it one.
    """
    tensor = None if value is None or value.is_graph_input() else _tensor_of(value)
    if tensor is None or tensor.size > limit:
        return None
    return tensor.numpy()


def is_random(node: ir.Node) -> bool:
    """Whether two nodes like this one may give different results; a Dropout does while training."""
    if node.domain != "" or node.op_type != "Dropout":
        return node.domain == "" and node.op_type in _RANDOM
    training = node.inputs[2] if len(node.inputs) > 2 else None
    known = constant_of(training)
    return training is not None and (known is None or bool(known.any()))


def _tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """As `ir.convenience.get_const_tensor`, which renames the tensor of a Constant: looking must not change a graph."""
    node = value.producer()
    if value.const_value is None and node is not None and node.op_type == "Constant" and "value" in node.attributes:
        attribute = node.attributes["value"]
        return None if attribute.is_ref() else attribute.as_tensor()
    return ir.convenience.get_const_tensor(value)


def scalar_of(value: ir.Value | None) -> float | None:
    """The number behind a constant of exactly one element, of whatever rank, else None."""
    array = constant_of(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def sole_user(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``, or None if there are more, none, or it leaves the graph."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value`` if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def rank_of(value: ir.Value | None) -> int | None:
    """The number of dimensions of a value whose shape is known, else None."""
    return None if value is None or value.shape is None else len(value.shape)


def width_of(value: ir.Value) -> int:
    """The last dimension of a value; 0 if it is not known."""
    width = value.shape[-1] if value.shape is not None and len(value.shape) else 0
    return width if isinstance(width, int) else 0


def is_weight_matrix(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant of rank two (read or referenced, never a graph input)."""
    return value is not None and not value.is_graph_input() and value.const_value is not None and rank_of(value) == 2


def location_of(node: ir.Node) -> str:
    """Name, operator and, where the exporter recorded it, the PyTorch module of a node."""
    module = module_of(node)
    output = node.outputs[0].name if node.outputs else None
    return f"{node.op_type} {node.name or output!r}" + (f" in {module}" if module else "")


def module_of(node: ir.Node) -> str:
    """Path of the PyTorch module that a node comes from; nothing if the exporter did not record it."""
    scopes = node.metadata_props.get(NAME_SCOPES)
    return "" if scopes is None else innermost_module(scopes)


def innermost_module(scopes: str) -> str:
    """`encoder.layer.0.attention` out of the exporter's list of nested scopes (its last entry names the op)."""
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    return next((name for name in reversed(names[:-1]) if name), "the model")


def graphs_of(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, every subgraph below it, and every function."""
    yield from model.graphs()
    yield from model.functions.values()


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds in its attributes (the branches of an If, the body of a Loop or Scan)."""
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the model and its subgraphs, each tensor object counted once."""
    tensors = {
        id(value.const_value): value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    }
    return sum(tensors.values())


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


def stand_in(old: ir.Value, new: ir.Value, suffix: str) -> None:
    """Let ``new`` be read instead of ``old``, under its name and with its type; the old one gets a suffix.

    What was observed of the old one is known of the new one as well.
    """
    new.shape, new.type = old.shape, old.type
    new.meta.update(old.meta)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}_{suffix}", old.name


def vector_operand(node: ir.Node, width: int) -> int | None:
    """The first input of a node that is a constant vector of ``width`` entries, by its number."""
    return next((index for index, value in enumerate(node.inputs) if is_constant_vector(value, width)), None)


def is_constant_vector(value: ir.Value | None, width: int) -> bool:
    """Whether ``value`` is a constant of shape (width,)."""
    array = constant_of(value)
    return array is not None and array.shape == (width,)


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


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    """The shape of a tensor, whose dimensions are always numbers."""
    return ir.Shape(sizes_of(tensor))


def sizes_of(tensor: ir.TensorProtocol) -> list[int]:
    """The dimensions of a tensor."""
    return [int(dim) for dim in tensor.shape if isinstance(dim, int)]


def opset_of(model: ir.Model) -> int:
    """The version of the standard ONNX domain that the model imports (0 if it imports none)."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def operators_of(model: ir.Model) -> dict[str, int]:
    """How often each operator is in a graph and its subgraphs; those outside of ONNX as `domain::Operator`."""
    nodes = model.graph.all_nodes()
    names = (node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}" for node in nodes)
    return dict(sorted(Counter(names).items()))


def border_of(model: ir.Model) -> list[tuple[str | None, ir.DataType | None]]:
    """Names and types of what a model takes and gives: components hand each other tensors by them."""
    return [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]


def without_weights(model: ir.Model, limit: int = 1024) -> ir.Model:
    """A copy in which used initializers of more than ``limit`` elements are references to a file that is not there.

    What decides shapes (axes, sizes, repeats) keeps its values; what is big is neither read nor copied.
    """
    copy = model.clone()
    for value in _big_initializers(copy, limit):
        tensor = value.const_value
        if tensor is not None:
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=shape_of(tensor), name=value.name or ""
            )
    return embedded(copy, limit)


@dataclass(frozen=True)
class Lent:
    """A copy of a model without its large weights, and those: whoever runs it is lent them, so that none are copied."""

    model: ir.Model
    inputs: Mapping[str, ir.TensorProtocol]
    """Weights that the copy takes as inputs."""
    constants: Mapping[str, ir.TensorProtocol]
    """Weights that stay constant: the copy says that they lie in a file, which does not exist."""


def lend_weights(model: ir.Model, limit: int = 1024, constant_for: Container[str] = ()) -> Lent:
    """Take its initializers of more than ``limit`` elements out of a copy of ``model``.

    Those that operators of ``constant_for`` read stay constant. Those of less than a byte an entry stay in the copy: in
    an array each takes a byte, which is not how they are given.
    """
    copy = model.clone()
    inputs: dict[str, ir.TensorProtocol] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    for value in _big_initializers(copy, limit):
        tensor, name = value.const_value, value.name
        if tensor is None or name is None or name not in copy.graph.initializers or tensor.dtype.bitwidth < 8:
            _embed(value)
        elif any(use.node.op_type in constant_for for use in value.uses()):
            constants[name] = tensor
            shape = ir.Shape(sizes_of(tensor))
            value.const_value = ir.ExternalTensor("lent", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
        else:
            inputs[name] = tensor
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
    return Lent(embedded(copy, limit), inputs, constants)


def embedded(model: ir.Model, limit: int) -> ir.Model:
    """The model with small initializers (at most ``limit`` elements) in it that lay in files: its bytes can travel."""
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        if value.const_value is not None and value.const_value.size <= limit:
            _embed(value)
    return model


def _embed(value: ir.Value) -> None:
    """Read a constant that lies in a file."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _big_initializers(model: ir.Model, limit: int) -> list[ir.Value]:
    values = [value for graph in model.graphs() for value in graph.initializers.values() if value.uses()]
    return [value for value in values if value.const_value is not None and value.const_value.size > limit]


def sizes_of_values(model: ir.Model, axes: Mapping[str, int]) -> tuple[dict[int, int], int]:
    """Bytes of each value that a node of the main graph makes, by id, when axes have these sizes (1 if not named).

    Recorded shapes are taken where they name their axes; what they leave open, the standard's shape inference fills in
    on a copy without weights whose inputs have the sizes. Returns also how many values stay unknown (they count 0).
    """
    inferred = _infer_at(model, axes)
    sizes: dict[int, int] = {}
    unknown = 0
    for node, twin in zip(model.graph, inferred.graph, strict=True):
        for value, other in zip(node.outputs, twin.outputs, strict=True):
            shapes = (_at(value.shape, axes), _at(other.shape, {}))
            known = next((shape for shape in shapes if shape is not None), None)
            dtype = value.dtype or other.dtype
            unknown += known is None or dtype is None
            sizes[id(value)] = 0 if known is None or dtype is None else math.prod(known) * dtype.bitwidth // 8
    return sizes, unknown


def _infer_at(model: ir.Model, axes: Mapping[str, int]) -> ir.Model:
    copy = without_weights(model)
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else axes.get(dim.value or "", 1) for dim in value.shape]
            )
    for node in copy.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    inferred: ir.Model = ir.from_proto(
        onnx.shape_inference.infer_shapes(ir.to_proto(copy), data_prop=follows_few(copy))
    )
    return inferred


def _at(shape: ir.Shape | None, axes: Mapping[str, int]) -> list[int] | None:
    """The shape in numbers when axes have these sizes, or None if a dimension is neither a number nor such an axis."""
    if shape is None:
        return None
    dims = [dim if isinstance(dim, int) else axes.get(dim.value or "") for dim in shape]
    known = [dim for dim in dims if dim is not None]
    return known if len(known) == len(dims) else None
