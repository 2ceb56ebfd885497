"""Store tables of embeddings in 8 bits, with a scale for each row.

Before:  e = Gather (table, ids)                                                             table: float [words, width]
After:   q = Gather (table_int8, ids);  f = Cast <to=1> (q);  s = Gather (table_scale, ids);  e = Mul (f, s)

Only the rows that are looked up are made float again. A table that is read by anything else stays; the head tied to an
embedding reads a copy of its own, which quantize-weights is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import is_weight_matrix, location_of, sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.quantization._rounding import blocks_of


@dataclass(frozen=True)
class QuantizeEmbeddings(Pass):
    """Quantize each table that Gathers alone read, row by row, symmetric around zero."""

    name: ClassVar[str] = "quantize-embeddings"
    exact: ClassVar[bool] = False

    minimum: Annotated[int, Ge(0)] = 1 << 16
    """Elements that a table must have to be worth it."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the tables of the main graph and its subgraphs, wherever they are read."""
        result = PassResult(model, modified=False)
        constants = [value for graph in model.graphs() for value in graph.initializers.values()]
        for table in [value for value in constants if is_weight_matrix(value)]:
            readers = [use.node for use in table.uses() if use.idx == 0 and _looks_up(use.node)]
            if not readers:
                continue
            reason = self._obstacle(table, len(readers))
            if reason is not None:
                result.refusals.append(Refusal.at(readers[0], reason, table))
            elif isinstance(table.graph, ir.Graph) and admitted():
                result.sites.append(location_of(readers[0]))
                _rewrite(table.graph, table, readers)
        result.modified = bool(result.sites)
        return result

    def _obstacle(self, table: ir.Value, readers: int) -> str | None:
        """Why a table stays as it is."""
        tensor = table.const_value
        if tensor is None or tensor.dtype is not ir.DataType.FLOAT:
            return "its table is not of type FLOAT"
        if tensor.size < self.minimum:
            return f"its table has {tensor.size} elements, fewer than {self.minimum}"
        if len(list(table.uses())) > readers or table.is_graph_output():
            return "its table is read by more than lookups of rows"
        return None if np.isfinite(tensor.numpy()).all() else "its table holds NaN or infinity"


def _looks_up(node: ir.Node) -> bool:
    """Whether a node takes rows of its first operand."""
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and node.domain == "" and (axis is None or axis.as_int() == 0)


def _rewrite(graph: ir.Graph, table: ir.Value, readers: list[ir.Node]) -> None:
    tensor, name = table.const_value, table.name or ""
    if tensor is None:
        raise ValueError(f"{name!r} was not checked")
    width = sizes_of(tensor)[1]
    rows = blocks_of(tensor.numpy().T, 8, width, symmetric=True, method="nearest")
    int8 = lazy(
        lambda: np.ascontiguousarray(rows.integers(tensor.numpy().T).T),
        ir.DataType.INT8,
        sizes_of(tensor),
        f"{name}_int8",
    )
    stored = add_initializer(graph, f"{name}_int8", int8)
    scale = add_initializer(graph, f"{name}_scale", np.ascontiguousarray(rows.scale.T))
    for reader in readers:
        _look_up(reader, stored, scale)
    del graph.initializers[name]


def _look_up(reader: ir.Node, stored: ir.Value, scale: ir.Value) -> None:
    """Put the rows that one Gather takes in its place."""
    graph, ids, old = reader.graph, reader.inputs[1], reader.outputs[0]
    if graph is None:
        raise ValueError(f"{reader.name!r} was removed")
    base = old.name
    tape = ir.tape.Tape()
    integers = tape.op("Gather", [stored, ids], {"axis": 0})
    sizes = tape.op("Gather", [scale, ids], {"axis": 0})
    real = tape.op("Cast", [integers], {"to": ir.DataType.FLOAT})
    found = tape.op("Mul", [real, sizes])
    for node, what in zip(tape.nodes, ("int8", "scale", "real", "found"), strict=True):
        node.name = node.outputs[0].name = f"{base}_{what}"
        copy_location(reader, node)
    if old.shape is not None:
        sizes.shape = ir.Shape([*old.shape[:-1], 1])
    for value, kind in ((integers, ir.DataType.INT8), (sizes, ir.DataType.FLOAT), (real, ir.DataType.FLOAT)):
        value.shape, value.type = value.shape or old.shape, ir.TensorType(kind)
    found.shape, found.type = old.shape, old.type
    graph.insert_before(reader, tape.nodes)
    ir.convenience.replace_all_uses_with(old, found, replace_graph_outputs=True)
    graph.remove(reader, safe=True)
    old.name, found.name = f"{base}_whole", base
