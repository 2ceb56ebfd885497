"""Say how many entries of an activation share a step where the runtime rounds activations by itself.

Before:  d = DequantizeLinear (w8, s);  r = MatMul (x, d)
After:   the same; the model says {"planish.activation_group": "128"}

A runtime that multiplies float activations by stored integers may round the activations to 8 bits first, a group
of entries of a row at a time. Small groups are closer, large ones faster: behind each group the sums become floats.
OpenVINO takes 32 entries unless the file says otherwise; with 128 its products were 1.3 times as fast (decision 53).
The graph stays as it is: only the engine shows the effect, and is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
from annotated_types import Ge, MultipleOf

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.annotations import ACTIVATION_GROUP
from planish.optimizer.ir.graph import location_of, producer_of, sizes_of


@dataclass(frozen=True)
class GroupActivations(Pass):
    """Say how many entries share a step where the runtime rounds activations itself, as OpenVINO does."""

    name: ClassVar[str] = "group-activations"
    exact: ClassVar[bool] = False

    size: Annotated[int, Ge(16), MultipleOf(16)] = 128
    """Entries of a row that share a step. Where weights have a scale for fewer entries, or a remainder, the model is
    left alone: the runtime then rounds nothing, or slowly. Other runtimes than OpenVINO take no notice."""

    def call(self, model: ir.Model) -> PassResult:
        """Mark the model if all products of stored integers bear it."""
        result = PassResult(model, modified=False)
        blocks = {node: block for node in model.graph.all_nodes() if (block := _block_of(node))}
        result.refusals = [
            Refusal.at(node, f"{block} weights share a scale, no multiple of {self.size}", node.inputs[1])
            for node, block in blocks.items()
            if block % self.size
        ]
        marked = model.metadata_props.get(ACTIVATION_GROUP) == str(self.size)
        if blocks and not result.refusals and not marked and admitted():
            model.metadata_props[ACTIVATION_GROUP] = str(self.size)
            # The runtime knows one size for all of them, so they are one site.
            result.sites = [f"all products that read stored integers, from {location_of(next(iter(blocks)))}"]
            result.facts = {"products": len(blocks)}
            result.modified = True
        return result


def _block_of(node: ir.Node) -> int:
    """Entries of a column that share a scale, for a MatMul of a float activation by stored integers; else 0."""
    if node.op_type != "MatMul":
        return 0
    rounded, matrix = (producer_of(value, "DequantizeLinear") for value in node.inputs)
    stored = None if matrix is None else matrix.inputs[0]
    if rounded is not None or matrix is None or stored is None or stored.const_value is None:
        return 0
    return matrix.attributes.get_int("block_size", 0) or sizes_of(stored.const_value)[0]
