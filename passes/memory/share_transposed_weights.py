"""Store a matrix once that is read both directly and transposed.

Before:  e = Gather (w, ids);  …;  r = MatMul (h, t)        (t holds w transposed: a second copy of it)
After:   v = Transpose <perm=[1,0]> (w);  e = Gather (w, ids);  …;  r = MatMul (h, v)

This is the embedding that a language model's head is tied to: a quarter of the weights of GPT-2. A runtime transposes
the constant at load time, or reads it with other strides; the computed MatMul is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal
from planish.optimizer.ir.graph import is_weight_matrix, location_of, sizes_of
from planish.optimizer.ir.lazy_tensors import Turnable, origin_of


@dataclass(frozen=True)
class ShareTransposedWeights(Pass):
    """Replace the second copy of an embedding that MatMuls read by its transpose, from ``minimum`` elements on."""

    name: ClassVar[str] = "share-transposed-weights"

    minimum: Annotated[int, Ge(0)] = 1 << 16
    """Minimum elements of a matrix; below it a Transpose at load time does not pay."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph: each table that a Gather reads, and the MatMuls with its transpose."""
        result = PassResult(model, modified=False)
        tables = [value for value in model.graph.initializers.values() if is_weight_matrix(value) and _gathered(value)]
        for value in [value for value in model.graph.initializers.values() if is_weight_matrix(value)]:
            table = next((table for table in tables if table is not value and _is_transposed(table, value)), None)
            if table is None:
                continue
            refusal = self._refusal(value)
            if refusal is not None:
                result.refusals.append(refusal)
                continue
            result.sites += [location_of(use.node) for use in value.uses()]
            _compute(model.graph, value, table)
        result.modified = bool(result.sites)
        return result

    def _refusal(self, value: ir.Value) -> Refusal | None:
        """The reason why this copy stays."""
        users = [use.node for use in value.uses()]
        if value.const_value is not None and value.const_value.size < self.minimum:
            return Refusal.at(
                users[0], f"its matrix has {value.const_value.size} elements, fewer than {self.minimum}", value
            )
        other = next((use.node for use in value.uses() if use.node.op_type != "MatMul" or use.idx != 1), None)
        if other is not None or value.is_graph_output():
            return Refusal.at(other or users[0], "its matrix is read by more than products from the right", value)
        return None


def _gathered(value: ir.Value) -> bool:
    return any(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())


def _is_transposed(table: ir.Value, value: ir.Value) -> bool:
    """True if ``value`` is used and holds the transpose of ``table``.

    If the origins of both are known, nothing is read; otherwise they are compared strip by strip.
    """
    ours, theirs = value.const_value, table.const_value
    if ours is None or theirs is None or ours.dtype is not theirs.dtype or not value.uses():
        return False
    if sizes_of(ours) != sizes_of(theirs)[::-1]:
        return False
    origins = (origin_of(ours), origin_of(theirs))
    # Origins decide without reading hundreds of megabytes.
    if isinstance(origins[0], Turnable) and isinstance(origins[1], Turnable):
        return origins[0] == origins[1].transposed((1, 0))
    return all(a.tobytes() == b.T.tobytes() for a, b in _strips(ours.numpy(), theirs.numpy()))


def _strips(ours: np.ndarray, theirs: np.ndarray, rows: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(ours), rows):
        yield ours[start : start + rows], theirs[:, start : start + rows]


def _compute(graph: ir.Graph, value: ir.Value, table: ir.Value) -> None:
    """Replace an initializer by the transpose of another, inserted at the beginning."""
    name = value.name or ""
    node = ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{name}_transpose")
    turned = node.outputs[0]
    turned.shape, turned.type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, turned)
    del graph.initializers[name]
    # The Transpose takes the name of the initializer that it replaces.
    turned.name = name
    graph.insert_before(graph[0], node)
