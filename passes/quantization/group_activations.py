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
from annotated_types import Ge

from planish.optimizer.interfaces.pass_base import Pass, PassResult, admitted
from planish.optimizer.ir.graph import ACTIVATION_GROUP, location_of, producer_of


@dataclass(frozen=True)
class GroupActivations(Pass):
    """Say how many entries share a step where the runtime rounds activations itself, as OpenVINO does."""

    name: ClassVar[str] = "group-activations"
    exact: ClassVar[bool] = False

    size: Annotated[int, Ge(16)] = 128
    """Entries of a row that share a step. The runtime may take less where a row has less."""

    def call(self, model: ir.Model) -> PassResult:
        """Mark the model if it has such a product."""
        result = PassResult(model, modified=False)
        products = [location_of(node) for node in model.graph if _reads_stored_integers(node)]
        if products and model.metadata_props.get(ACTIVATION_GROUP) != str(self.size) and admitted():
            model.metadata_props[ACTIVATION_GROUP] = str(self.size)
            # The runtime knows one size for all of them, so they are one site.
            result.sites = [f"all products that read stored integers, from {products[0]}"]
            result.facts = {"products": len(products)}
            result.modified = True
        return result


def _reads_stored_integers(node: ir.Node) -> bool:
    """True for a MatMul of an activation in float by a matrix that is stored in integers."""
    if node.op_type != "MatMul":
        return False
    rounded, matrix = (producer_of(value, "DequantizeLinear") for value in node.inputs)
    stored = None if matrix is None else matrix.inputs[0]
    return rounded is None and stored is not None and stored.is_initializer()
