"""Prune the weakest neurons of feed-forward blocks; their matrices become smaller.

Before:  u = MatMul (x, w1);  h = Add (u, b1);  a = Gelu (h);  r = MatMul (a, w2)     w1: 768 x 3072, w2: 3072 x 768
After:   the same nodes, w1: 768 x 2304, b1: 2304, w2: 2304 x 768                     (keep=0.75)

Structured magnitude pruning: a neuron's weight is the product of the Euclidean norms of its input and output weights
(Li et al. 2017, "Pruning Filters for Efficient ConvNets", applied to both sides of a neuron).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Gt, Le

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.graph import is_weight_matrix, location_of, shape_of, sizes_of
from planish.optimizer.ir.lazy_tensors import taken

_ELEMENTWISE = frozenset(
    {
        *("Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Elu", "LeakyRelu", "HardSwish", "Mish", "Softplus", "Swish"),
        *("Abs", "Neg", "Sqrt", "Exp", "Pow", "Add", "Sub", "Mul", "Div", "Identity", "Dropout", "Cast"),
    }
)


@dataclass(frozen=True)
class PruneFfn(Pass):
    """Keep the strongest share of the hidden neurons of each feed-forward block, gated ones included.

    A block is one down-projection whose input comes, through elementwise operators only, from up-projections: one for a
    plain block, two for a gated one. Every reader of a pruned neuron must be in the block, or the block is refused.
    """

    name: ClassVar[str] = "prune-ffn"
    exact: ClassVar[bool] = False

    keep: Annotated[float, Gt(0), Le(1)] = 0.75
    """Share of the neurons to keep."""

    multiple: Annotated[int, Ge(1)] = 32
    """Multiple to which the number of kept neurons is rounded up, for efficient kernels."""

    def call(self, model: ir.Model) -> PassResult:
        """Prune every block of the main graph."""
        result = PassResult(model, modified=False)
        dropped = 0
        for node in [node for node in model.graph if _is_product(node)]:
            block = _Block.behind(node)
            if block is None:
                continue
            reason = block.obstacle()
            if reason is not None:
                result.refusals.append(Refusal.at(node, reason[0], reason[1]))
            elif admitted():
                dropped += self._prune(block)
                result.sites.append(location_of(node))
        result.modified = dropped > 0
        result.facts = {"neurons_dropped": dropped}
        return result

    def _prune(self, block: _Block) -> int:
        strength = block.strength()
        # Negated floor division rounds up.
        wanted = -(-round(len(strength) * self.keep) // self.multiple) * self.multiple
        # Stable and sorted: ties, and the order of the kept neurons, must not depend on the platform.
        kept = np.sort(np.argsort(-strength, kind="stable")[: min(wanted, len(strength))])
        if len(kept) < len(strength):
            block.shrink(kept)
        return len(strength) - len(kept)


@dataclass
class _Block:
    """One feed-forward block: the down-projection, the up-projections, and the nodes between them."""

    down: ir.Node
    ups: list[ir.Node] = field(default_factory=list)
    between: list[ir.Node] = field(default_factory=list)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)
    """Vectors over the neurons (biases, scales), as (reader, input)."""

    @classmethod
    def behind(cls, down: ir.Node) -> _Block | None:
        """The block that ends in ``down``; None if its input is not an elementwise result of up-projections."""
        block = cls(down)
        source = down.inputs[0].producer() if down.inputs[0] is not None else None
        pending, seen = [source], set()
        while pending:
            node = pending.pop()
            if node is None or id(node) in seen:
                if node is None:
                    return None
                continue
            seen.add(id(node))
            if _is_product(node):
                block.ups.append(node)
            elif node.op_type in _ELEMENTWISE and node.domain == "":
                block.between.append(node)
                pending += block._operands(node)
            else:
                return None
        return block if block.ups and block.between and block._widens() else None

    def _operands(self, node: ir.Node) -> list[ir.Node | None]:
        """Producers of the operands; constants are recorded and not followed."""
        producers: list[ir.Node | None] = []
        for index, value in enumerate(node.inputs):
            # A scalar applies to every neuron and need not be cut.
            if value is None or (value.const_value is not None and value.const_value.size == 1):
                continue
            if value.const_value is not None:
                self.constants.append((node, index))
            else:
                producers.append(value.producer())
        return producers

    def _widens(self) -> bool:
        return all(up.inputs[1] is not None and _columns(up) == self.neurons > 1 for up in self.ups)

    @property
    def neurons(self) -> int:
        """Rows of the down-projection."""
        return sizes_of(_tensor(self.down.inputs[1]))[0]

    def obstacle(self) -> tuple[str, ir.Value] | None:
        """The reason why the block cannot be pruned: an outside reader, a shared weight, an unsupported constant."""
        inside = {id(self.down), *(id(node) for node in self.between)}
        for node in (*self.ups, *self.between):
            for value in node.outputs:
                if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses()):
                    return "its neurons are read outside of the block", value
        for node, index in [(up, 1) for up in self.ups] + [(self.down, 1), *self.constants]:
            weight = node.inputs[index]
            if weight is not None and len(list(weight.uses())) > 1:
                return "a weight of it is used elsewhere as well", weight
        for node, index in self.constants:
            vector = node.inputs[index]
            if vector is not None and sizes_of(_tensor(vector)) != [self.neurons]:
                return "a constant in it is not a vector over its neurons", vector
        return None

    def strength(self) -> np.ndarray:
        """Norm of input weights times norm of output weights of each neuron, shape (neurons,)."""
        # float64: squares of float16 weights overflow.
        total: np.ndarray = np.linalg.norm(_tensor(self.down.inputs[1]).numpy().astype(np.float64), axis=1)
        for up in self.ups:
            total = total * np.linalg.norm(_tensor(up.inputs[1]).numpy().astype(np.float64), axis=0)
        return total

    def shrink(self, kept: np.ndarray) -> None:
        """Reduce every matrix and vector of the block to the neurons ``kept``."""
        for up in self.ups:
            _cut(up.inputs[1], kept, 1)
        for node, index in self.constants:
            _cut(node.inputs[index], kept, 0)
        _cut(self.down.inputs[1], kept, 0)
        for node in (*self.ups, *self.between):
            for value in node.outputs:
                if value.shape is not None:
                    value.shape = ir.Shape([*value.shape[:-1], len(kept)])


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and node.domain == "" and is_weight_matrix(node.inputs[1])


def _columns(node: ir.Node) -> int:
    return sizes_of(_tensor(node.inputs[1]))[1]


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    if value is None or value.const_value is None:
        raise ValueError("a weight has no values")
    return value.const_value


def _cut(value: ir.Value | None, kept: np.ndarray, axis: int) -> None:
    if value is not None:
        value.const_value = taken(_tensor(value), kept, axis, value.name or "")
        value.shape = shape_of(value.const_value)
