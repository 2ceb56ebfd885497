"""Store tables of embeddings in 8 bits, with a scale for each row.

Before:  e = Gather (table, ids)                                                             table: float [words, width]
After:   q = Gather (table_int8, ids);  f = Cast <to=1> (q);  s = Gather (table_scale, ids);  e = Mul (f, s)

Only the rows that are looked up are dequantized. A table that anything else reads stays; the head tied to an embedding
reads a transposed copy, which quantize-weights quantizes.
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
from planish.passes.quantization._blocks import BlockFormat
from planish.passes.quantization.methods.nearest import Nearest


@dataclass(frozen=True)
class QuantizeEmbeddings(Pass):
    """Quantize each table that Gathers alone read, row by row, symmetric around zero."""

    name: ClassVar[str] = "quantize-embeddings"
    exact: ClassVar[bool] = False

    minimum: Annotated[int, Ge(0)] = 1 << 16
    """Smallest number of elements of a table that is quantized."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the tables of the main graph and its subgraphs, wherever they are read."""
        result = PassResult(model, modified=False)
        constants = [value for graph in model.graphs() for value in graph.initializers.values()]
        for table in [value for value in constants if is_weight_matrix(value)]:
            lookups = [use.node for use in table.uses() if use.idx == 0 and _takes_rows(use.node)]
            if not lookups:
                continue
            reason = self._unsupported(table, len(lookups))
            if reason is not None:
                result.refusals.append(Refusal.at(lookups[0], reason, table))
            elif isinstance(table.graph, ir.Graph) and admitted():
                result.sites.append(location_of(lookups[0]))
                _rewrite(table.graph, table, lookups)
        result.modified = bool(result.sites)
        return result

    def _unsupported(self, table: ir.Value, lookups: int) -> str | None:
        """Reason why a table stays in float; None if it need not."""
        tensor = table.const_value
        if tensor is None or tensor.dtype is not ir.DataType.FLOAT:
            return "its table is not of type FLOAT"
        if tensor.size < self.minimum:
            return f"its table has {tensor.size} elements, fewer than {self.minimum}"
        # A tied head multiplies by the table: quantized for lookups alone, it would be stored twice.
        if len(list(table.uses())) > lookups or table.is_graph_output():
            return "its table is read by more than lookups of rows"
        return None if np.isfinite(tensor.numpy()).all() else "its table holds NaN or infinity"


def _takes_rows(node: ir.Node) -> bool:
    """True if a node is a Gather of rows of its first operand."""
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and node.domain == "" and (axis is None or axis.as_int() == 0)


def _rewrite(graph: ir.Graph, table: ir.Value, lookups: list[ir.Node]) -> None:
    """Replace a table by its integers and scales, and each lookup by the lookup of both."""
    tensor, name = table.const_value, table.name or ""
    if tensor is None:
        raise ValueError(f"{name!r} is not a constant")
    width = sizes_of(tensor)[1]
    # Blocks are cut from columns: the rows of a table are the columns of its transpose, one block each.
    blocks = Nearest(BlockFormat(8, width, symmetric=True)).fit(tensor.numpy().T)
    int8 = lazy(
        lambda: np.ascontiguousarray(blocks.integers(tensor.numpy().T).T),
        ir.DataType.INT8,
        sizes_of(tensor),
        f"{name}_int8",
    )
    integers = add_initializer(graph, f"{name}_int8", int8)
    scale = add_initializer(graph, f"{name}_scale", np.ascontiguousarray(blocks.scale.T))
    for lookup in lookups:
        _look_up(lookup, integers, scale)
    del graph.initializers[name]


def _look_up(lookup: ir.Node, table: ir.Value, scales: ir.Value) -> None:
    """Replace one Gather of rows in float by Gathers of integers and scales, and their product."""
    graph, ids, old = lookup.graph, lookup.inputs[1], lookup.outputs[0]
    if graph is None:
        raise ValueError(f"{lookup.name!r} was removed")
    base = old.name
    tape = ir.tape.Tape()
    integers = tape.op("Gather", [table, ids], {"axis": 0})
    scale = tape.op("Gather", [scales, ids], {"axis": 0})
    real = tape.op("Cast", [integers], {"to": ir.DataType.FLOAT})
    rows = tape.op("Mul", [real, scale])
    for node, suffix in zip(tape.nodes, ("int8", "scale", "real", "found"), strict=True):
        node.name = node.outputs[0].name = f"{base}_{suffix}"
        copy_location(lookup, node)
    if old.shape is not None:
        scale.shape = ir.Shape([*old.shape[:-1], 1])
    for value, dtype in ((integers, ir.DataType.INT8), (scale, ir.DataType.FLOAT), (real, ir.DataType.FLOAT)):
        value.shape, value.type = value.shape or old.shape, ir.TensorType(dtype)
    rows.shape, rows.type = old.shape, old.type
    graph.insert_before(lookup, tape.nodes)
    ir.convenience.replace_all_uses_with(old, rows, replace_graph_outputs=True)
    graph.remove(lookup, safe=True)
    # The result keeps its name: it may be an output, and options name values of the graph.
    old.name, rows.name = f"{base}_whole", base
