"""Two passes: one that does no good, and one that is wrong on purpose."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer import Pass, PassResult
from planish.optimizer.ir.graph import location_of


@dataclass(frozen=True)
class NegateTwice(Pass):
    """Put two negations behind every Tanh: slower and right."""

    name: ClassVar[str] = "negate-twice"

    pairs: int = 1
    """How many pairs of negations."""

    def call(self, model: ir.Model) -> PassResult:
        sites = []
        for node in [node for node in model.graph if node.op_type == "Tanh"]:
            _follow(model, node, ["Neg"] * (2 * self.pairs))
            sites.append(location_of(node))
        return PassResult(model, bool(sites), sites=sites)


@dataclass(frozen=True)
class NegateGelu(Pass):
    """Claim to be exact and put a negation behind every Gelu: wrong, and to be found out."""

    name: ClassVar[str] = "negate-gelu"

    def call(self, model: ir.Model) -> PassResult:
        sites = []
        for node in [node for node in model.graph if node.op_type == "Gelu"]:
            _follow(model, node, ["Neg"])
            sites.append(location_of(node))
        return PassResult(model, bool(sites), sites=sites)


def _follow(model: ir.Model, node: ir.Node, op_types: list[str]) -> None:
    """Insert a chain of unary operators behind a node."""
    output = node.outputs[0]
    users = list(output.uses())
    value, last = output, node
    for index, op_type in enumerate(op_types):
        made = ir.node(op_type, [value], name=f"{output.name}_{op_type}_{index}")
        made.outputs[0].name = made.name
        made.outputs[0].shape, made.outputs[0].type = output.shape, output.type
        model.graph.insert_after(last, made)
        value, last = made.outputs[0], made
    for use in users:
        use.node.replace_input_with(use.idx, value)
