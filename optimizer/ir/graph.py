"""Queries of a graph that onnx_ir does not offer. No policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

FINITE_MASK = "planish.finite_mask"
"""Metadata key of an Attention whose mask is finite: no row is fully masked, and no result is NaN."""
IN_FLOAT = "planish.in_float"
"""Metadata key of a MatMul that must not be quantized: it multiplies the outlier channels."""
SPELLED_OUT = "planish.spelled_out"
"""Metadata key of the nodes of a decomposed operator (faster on the target); the value is the pass that wrote them."""


def constant_of(value: ir.Value | None, limit: int = 1 << 16) -> np.ndarray | None:
    """The array of a constant with at most ``limit`` elements, else None.

    Reads initializers and ``Constant`` nodes. The limit prevents callers from reading large weights. A graph input with
    a default value is not constant.
    """
    tensor = None if value is None or value.is_graph_input() else _tensor_of(value)
    if tensor is None or tensor.size > limit:
        return None
    return tensor.numpy()


def is_random(node: ir.Node) -> bool:
    """True if two equal nodes of this kind may give different results. A Dropout does so in training mode."""
    if node.domain != "" or node.op_type != "Dropout":
        return node.domain == "" and node.op_type in _RANDOM
    training = node.inputs[2] if len(node.inputs) > 2 else None
    mode = constant_of(training)
    return training is not None and (mode is None or bool(mode.any()))


def _tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """`ir.convenience.get_const_tensor` without its side effect: it renames the tensor of a Constant."""
    node = value.producer()
    if value.const_value is None and node is not None and node.op_type == "Constant" and "value" in node.attributes:
        attribute = node.attributes["value"]
        return None if attribute.is_ref() else attribute.as_tensor()
    return ir.convenience.get_const_tensor(value)


def scalar_of(value: ir.Value | None) -> float | None:
    """The number in a constant of exactly one element, of any rank, else None."""
    array = constant_of(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def sole_user(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``; None if there are several, none, or ``value`` is a graph output."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes ``value`` if it is one of these standard operators, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def rank_of(value: ir.Value | None) -> int | None:
    """The rank of a value, or None if it is unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def width_of(value: ir.Value) -> int:
    """The last dimension of a value; 0 if it is unknown."""
    width = value.shape[-1] if value.shape is not None and len(value.shape) else 0
    return width if isinstance(width, int) else 0


def is_weight_matrix(value: ir.Value | None) -> bool:
    """True if ``value`` is a constant of rank two, and no graph input."""
    return value is not None and not value.is_graph_input() and value.const_value is not None and rank_of(value) == 2


def location_of(node: ir.Node) -> str:
    """Name and operator of a node, and its PyTorch module if the exporter recorded it."""
    module = module_of(node)
    output = node.outputs[0].name if node.outputs else None
    return f"{node.op_type} {node.name or output!r}" + (f" in {module}" if module else "")


def module_of(node: ir.Node) -> str:
    """Path of the PyTorch module of a node; empty if the exporter did not record it."""
    scopes = node.metadata_props.get(NAME_SCOPES)
    return "" if scopes is None else innermost_module(scopes)


def innermost_module(scopes: str) -> str:
    """`encoder.layer.0.attention` from the exporter's list of nested scopes, whose last entry is the operator."""
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


def vector_operand(node: ir.Node, width: int) -> int | None:
    """Index of the first input of a node that is a constant vector of ``width`` entries."""
    return next((index for index, value in enumerate(node.inputs) if is_constant_vector(value, width)), None)


def is_constant_vector(value: ir.Value | None, width: int) -> bool:
    """True if ``value`` is a constant of shape (width,)."""
    array = constant_of(value)
    return array is not None and array.shape == (width,)


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
    """Number of nodes of each operator in a graph and its subgraphs. Those of other domains are `domain::Operator`."""
    nodes = model.graph.all_nodes()
    names = (node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}" for node in nodes)
    return dict(sorted(Counter(names).items()))


def io_signature(model: ir.Model) -> list[tuple[str | None, ir.DataType | None]]:
    """Names and types of the inputs and outputs of a model, through which components exchange tensors."""
    return [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]
