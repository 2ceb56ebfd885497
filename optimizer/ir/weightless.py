"""Graphs apart from their weights: printed without them, or run with weights that stay where they are."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES as NAME_SCOPES
from planish.optimizer.ir.graph import shape_of, sizes_of


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
class WeightlessModel:
    """A copy of a model without its large weights, and those: whoever runs it is lent them, so that none are copied."""

    model: ir.Model
    inputs: Mapping[str, ir.TensorProtocol]
    """Weights that the copy takes as inputs."""
    constants: Mapping[str, ir.TensorProtocol]
    """Weights that stay constant: the copy says that they lie in a file, which does not exist."""


def detach_weights(model: ir.Model, limit: int = 1024, constant_for: Container[str] = ()) -> WeightlessModel:
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
    return WeightlessModel(embedded(copy, limit), inputs, constants)


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
