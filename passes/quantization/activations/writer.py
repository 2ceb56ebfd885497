"""Nodes and constants of 8-bit MatMuls, shared where several read the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import MatMulSite
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import constant_of, sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._blocks import QuantizedBlocks


@dataclass
class SharedConstants:
    """Constants of the 8-bit form, in the main graph: every subgraph can read them there."""

    graph: ir.Graph
    blocks_of: Callable[[MatMulSite], QuantizedBlocks]
    """Integers and scales of a matrix, one block a column."""
    _weights: dict[int, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    """Matrix in int8 and its scales, by the id of the tensor that was quantized."""
    _by_name: dict[str, ir.Value] = field(default_factory=dict)

    def weight(self, site: MatMulSite) -> tuple[ir.Value, ir.Value]:
        """The matrix of a site in int8 and its scales, one for each column."""
        tensor, name = site.tensor, site.weight.name or ""
        # By tensor, not by value: two Casts of one 16-bit matrix are two values with the same float form.
        if id(tensor) not in self._weights:
            blocks = self.blocks_of(site)
            int8 = lazy(lambda: blocks.integers(tensor.numpy()), ir.DataType.INT8, sizes_of(tensor), f"{name}_int8")
            self._weights[id(tensor)] = (
                add_initializer(self.graph, f"{name}_int8", int8),
                add_initializer(self.graph, f"{name}_scale", blocks.scale[0]),
            )
        return self._weights[id(tensor)]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant that is written once; an equal one of an earlier run of this pass is used again."""
        if name not in self._by_name:
            earlier = self.graph.initializers.get(name)
            kept = None if earlier is None else constant_of(earlier)
            # The name alone is no proof: the model may have used it for something else.
            same = kept is not None and kept.dtype == array.dtype and np.array_equal(kept, array)
            self._by_name[name] = earlier if earlier and same else add_initializer(self.graph, name, array)
        return self._by_name[name]


@dataclass
class GraphWriter:
    """Writer that inserts nodes into one graph, and keeps the quantized activations that its MatMuls share."""

    graph: ir.Graph
    constants: SharedConstants
    _activations: dict[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)

    def once(self, activation: ir.Value, quantize: Callable[[], tuple[ir.Value, ...]]) -> tuple[ir.Value, ...]:
        """The values that ``quantize`` makes of an activation, once in this graph."""
        if activation not in self._activations:
            self._activations[activation] = quantize()
        return self._activations[activation]

    def add(
        self,
        before: ir.Node,
        suffix: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int] | None = None,
        *,
        shape: ir.Shape | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """The output of a new node in front of ``before``, with its shape and type."""
        (output,) = self.insert(before, (suffix,), op_type, inputs, attributes)
        output.shape, output.type = shape, ir.TensorType(dtype)
        return output

    def insert(
        self,
        before: ir.Node,
        suffixes: tuple[str, ...],
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int] | None = None,
    ) -> Sequence[ir.Value]:
        """The outputs of a new node in front of ``before``, named after its output and a suffix each."""
        base = before.outputs[0].name
        node = ir.node(op_type, inputs, attributes, num_outputs=len(suffixes), name=f"{base}_{op_type}_{suffixes[0]}")
        copy_location(before, node)
        for output, suffix in zip(node.outputs, suffixes, strict=True):
            output.name = f"{base}_{suffix}"
        self.graph.insert_before(before, node)
        return node.outputs
