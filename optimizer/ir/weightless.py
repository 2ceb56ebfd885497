"""Graphs without their weights: for printing, or for running with weights in place."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES as NAME_SCOPES
from planish.optimizer.ir.graph import shape_of, sizes_of


def without_weights(model: ir.Model, limit: int = 1024) -> ir.Model:
    """A copy in which used initializers of more than ``limit`` elements refer to a file that does not exist.

    Small constants, which determine shapes (axes, sizes, repeats), keep their values. Large ones are not read or
    copied.
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
    """A copy of a model without its large weights, and these weights, which a runtime takes without copying them."""

    model: ir.Model
    inputs: Mapping[str, ir.TensorProtocol]
    """Weights that are inputs of the copy."""
    constants: Mapping[str, ir.TensorProtocol]
    """Weights that stay constants: in the copy they refer to a file that does not exist."""


def detach_weights(model: ir.Model, limit: int = 1024, constant_for: Container[str] = ()) -> WeightlessModel:
    """Detach initializers of more than ``limit`` elements from a copy of ``model``.

    Those that operators of ``constant_for`` read stay constants. Sub-byte types stay in the copy, since an array has a
    byte per entry and the packed form could not be passed.
    """
    copy = model.clone()
    inputs: dict[str, ir.TensorProtocol] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    for value in _big_initializers(copy, limit):
        tensor, name = value.const_value, value.name
        # An initializer of a subgraph cannot become an input of the main graph.
        if tensor is None or name is None or name not in copy.graph.initializers or tensor.dtype.bitwidth < 8:
            _embed(value)
        elif any(use.node.op_type in constant_for for use in value.uses()):
            constants[name] = tensor
            shape = ir.Shape(sizes_of(tensor))
            # Never read: the runtime gets the array itself (add_external_initializers).
            value.const_value = ir.ExternalTensor("lent", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
        else:
            inputs[name] = tensor
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
    return WeightlessModel(embedded(copy, limit), inputs, constants)


def embedded(model: ir.Model, limit: int) -> ir.Model:
    """The model with small initializers (at most ``limit`` elements) read from external data, so that it can be
    serialized."""
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        if value.const_value is not None and value.const_value.size <= limit:
            _embed(value)
    return model


def _embed(value: ir.Value) -> None:
    """Read a constant from external data into memory."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _big_initializers(model: ir.Model, limit: int) -> list[ir.Value]:
    values = [value for graph in model.graphs() for value in graph.initializers.values() if value.uses()]
    return [value for value in values if value.const_value is not None and value.const_value.size > limit]
