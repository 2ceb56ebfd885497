"""Rotate the residual stream of a decoder, so that outliers are spread over all channels.

Before:  h = Gather (table, ids);    y = RMSNormalization (h, g);  p = MatMul (y, w);    ...;  k = MatMul (z, v)
         n = Add (h, k)
After:   h = Gather (table·Q, ids);  y = RMSNormalization (h, 1);  p = MatMul (y, Qᵀgw); ...;  k = MatMul (z, vQ)
         n = Add (h, k)

Q is orthogonal: a Hadamard matrix, times a cosine transform where the width is no power of two, with signs drawn once.
The root mean square of h is that of hQ: normalizations give the same, rotated, once their scales are in the matrices
behind them. No operator is added. Ashkboos et al. 2024, "QuaRot", section 4, stage 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.graph import (
    is_constant_vector,
    is_weight_matrix,
    location_of,
    sizes_of,
    vector_operand,
    width_of,
)
from planish.passes.quantization._operands import change_operand, tensor_of

_SEED = 0
_ROTATED = "planish.turned"
"""Metadata key of a normalization that reads a rotated stream: one rotation is enough."""

Operand = tuple[ir.Node, ir.Value | None]
"""A value of a stream, and a node that reads or writes it."""


class _NotRotatable(Exception):
    """Refusal of a stream, at the node that prevents its rotation."""

    def __init__(self, node: ir.Node, reason: str, culprit: ir.Value | None = None) -> None:
        super().__init__(reason)
        self.refusal = Refusal.at(node, reason, culprit)


@dataclass(frozen=True)
class RotateResidual(Pass):
    """Rotate all matrices that write to a stream of RMSNormalizations, and those that read it by the inverse."""

    name: ClassVar[str] = "rotate-residual"

    def call(self, model: ir.Model) -> PassResult:
        """Rotate the streams of the main graph, each as a whole or not at all."""
        result = PassResult(model, modified=False)
        visited: set[int] = set()
        for node in list(model.graph):
            if node.op_type != "RMSNormalization" or id(node.inputs[0]) in visited:
                continue
            stream = _Stream()
            try:
                stream.follow(node, node.inputs[0])
            except _NotRotatable as error:
                result.refusals.append(error.refusal)
            else:
                if stream.tables and admitted():
                    result.sites.append(location_of(node))
                    stream.rotate(model.graph)
            visited |= stream.values
        result.modified = bool(result.sites)
        return result


@dataclass
class _Stream:
    """The values of a residual stream, and the constants that write to it and read it."""

    values: set[int] = field(default_factory=set)
    tables: list[tuple[ir.Node, int]] = field(default_factory=list)
    """Constants whose last axis is the stream's: the node that reads each, and the index of the operand."""
    norms: list[ir.Node] = field(default_factory=list)
    """Normalizations that read the stream."""

    def follow(self, node: ir.Node, value: ir.Value | None) -> None:
        """Add a value that ``node`` reads or writes, and all values that Adds join it with.

        _NotRotatable if the basis of one of them cannot be changed.
        """
        # One wrong reader or writer is enough to refuse: in a stream, all values have the same basis.
        pending: list[Operand] = [(node, value)]
        while pending:
            neighbour, current = pending.pop()
            if current is None or id(current) in self.values:
                continue
            if current.is_graph_output() or current.producer() is None:
                raise _NotRotatable(neighbour, "the stream enters or leaves the model", current)
            self.values.add(id(current))
            pending += self._through_producer(current)
            for use in current.uses():
                pending += self._through_reader(use.node, current)

    def _through_producer(self, value: ir.Value) -> list[Operand]:
        """Values of the stream that the producer of ``value`` reads; its constants are recorded."""
        node = value.producer()
        if node is None:
            return []
        if node.op_type == "Gather" and is_weight_matrix(node.inputs[0]) and node.attributes.get_int("axis", 0) == 0:
            self.tables.append((node, 0))
            return []
        if node.op_type == "MatMul" and is_weight_matrix(node.inputs[1]):
            self.tables.append((node, 1))
            return []
        if node.op_type == "Add":
            bias = vector_operand(node, width_of(value))
            if bias is not None:
                self.tables.append((node, bias))
            return [(node, operand) for index, operand in enumerate(node.inputs) if index != bias]
        raise _NotRotatable(node, f"{node.op_type} writes to the stream", value)

    def _through_reader(self, node: ir.Node, value: ir.Value) -> list[Operand]:
        """Values of the stream that a reader of ``value`` writes; a normalization is recorded."""
        if node.op_type == "Add":
            return [(node, node.outputs[0])]
        if _ROTATED in node.metadata_props:
            raise _NotRotatable(node, "the stream is turned already", value)
        scale = node.inputs[1] if node.op_type == "RMSNormalization" and node.inputs[0] is value else None
        if not is_constant_vector(scale, width_of(value)) or node.attributes.get_int("axis", -1) != -1:
            raise _NotRotatable(node, f"{node.op_type} reads the stream", value)
        readers = [use.node for use in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or not all(_multiplies(reader, node.outputs[0]) for reader in readers):
            raise _NotRotatable(node, "what was normalized is read by more than products with constant matrices", value)
        self.norms.append(node)
        return []

    def rotate(self, graph: ir.Graph) -> None:
        """Rotate the constants."""
        rotation = rotation_of(sizes_of(tensor_of(self.norms[0].inputs[1]))[0])
        for node, index in self.tables:
            change_operand(graph, node, index, "rotated", lambda array: array @ rotation)
        for norm in self.norms:
            scale = tensor_of(norm.inputs[1]).numpy().astype(np.float32)
            # The scale moves from the normalization into the matrices: in the rotated basis it is a full matrix.
            back = np.ascontiguousarray(rotation.T * scale)
            for reader in [use.node for use in norm.outputs[0].uses()]:
                change_operand(graph, reader, 1, "rotated", functools.partial(np.matmul, back))
            change_operand(graph, norm, 1, "rotated", np.ones_like)
            norm.metadata_props[_ROTATED] = "1"


def rotation_of(width: int) -> np.ndarray:
    """An orthogonal matrix, float32, that spreads each channel over all others; the same one for the same width."""
    import scipy.fft
    import scipy.linalg

    power = width & -width  # the largest power of two that divides the width
    # Without signs a constant vector would end in a single channel: the opposite of what is wanted.
    signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], width)
    hadamard = scipy.linalg.hadamard(power) / np.sqrt(power)
    cosines = scipy.fft.dct(np.eye(width // power), norm="ortho", axis=0)
    return np.asarray(signs[:, None] * np.kron(cosines, hadamard), np.float32)


def _multiplies(node: ir.Node, data: ir.Value) -> bool:
    return node.op_type == "MatMul" and node.inputs[0] is data and is_weight_matrix(node.inputs[1])
