"""Token analysis of a graph: values with one row per token, row-wise nodes, and readers of padded rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from planish.optimizer.ir.graph import constant_of, is_weight_matrix, rank_of, sole_user
from planish.optimizer.ir.program import Role, guess_role

# fmt: off
_UNARY = frozenset({
    "Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "FastGelu", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "QuickGelu", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softplus",
    "Softsign", "Sqrt", "Swish", "Tanh",
})
_BROADCAST = frozenset({
    "Add", "And", "BiasGelu", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "Or", "Pow", "Sub", "Sum",
    "Where",
})
PRODUCTS = frozenset({"MatMul", "MatMulInteger", "MatMulIntegerToFloat"})
_NORMALIZATIONS = frozenset({"LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax"})
_REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"})
_MOVES = frozenset({
    "Concat", "Expand", "Gather", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})
# fmt: on
_OF_WEIGHTS = frozenset({"DequantizeLinear", "Transpose"})
_DOMAINS = frozenset(("", "com.microsoft"))


@dataclass(frozen=True)
class Tokens:
    """Values of a graph with one row per token, and row-wise nodes."""

    graph: ir.Graph
    mask: ir.Value
    axes: tuple[int | ir.SymbolicDim, int | ir.SymbolicDim]

    def hold(self, value: ir.Value | None) -> bool:
        """True if a value has shape (batch, sequence, numbers…)."""
        dims = [] if value is None or value.shape is None else list(value.shape)
        return len(dims) >= 2 and tuple(dims[:2]) == self.axes and all(isinstance(dim, int) for dim in dims[2:])

    def worthwhile(self) -> Iterator[ir.Node]:
        """Connected row-wise nodes with at least one MatMul by weights, in order."""
        alone = {id(node): node for node in self.graph if self._treats_rows(node)}
        group: dict[int, set[int]] = {}
        for key, node in alone.items():
            merged = {key}
            for value in node.inputs:
                producer = value.producer() if value is not None and self.hold(value) else None
                merged |= group.get(id(producer), set())
            group.update(dict.fromkeys(merged, merged))
        # Packing pays only for groups with a MatMul: moving rows costs about an elementwise operator.
        heavy = {id(group[key]) for key, node in alone.items() if _multiplies_weights(node)}
        return (node for key, node in alone.items() if id(group[key]) in heavy)

    def _treats_rows(self, node: ir.Node) -> bool:
        if node.domain not in _DOMAINS or not node.outputs or not all(map(self.hold, node.outputs)):
            return False
        operands = [value for value in node.inputs if value is not None]
        if not any(map(self.hold, operands)):
            return False
        if node.op_type in _UNARY:
            return True
        if node.op_type in _BROADCAST:
            rank = rank_of(node.outputs[0]) or 0
            return all(self._same_for_all(value, rank) for value in operands)
        return self.hold(node.inputs[0]) and self._keeps_rows_apart(node)

    def _same_for_all(self, value: ir.Value, rank: int) -> bool:
        """True if an operand has a row per token, or is equal for all tokens."""
        if value.shape is None:
            return False
        if self.hold(value):
            return len(value.shape) == rank
        return all(dim == 1 for dim in value.shape[: max(0, len(value.shape) - rank + 2)])

    def _keeps_rows_apart(self, node: ir.Node) -> bool:
        """True if an operator with one token operand does not mix tokens."""
        rest = [value for value in node.inputs[1:] if value is not None]
        rank = rank_of(node.inputs[0]) or 0
        if any(self.hold(value) for value in rest) and node.op_type != "MatMulIntegerToFloat":
            return False
        if node.op_type in PRODUCTS:
            # A MatMul of two activations (scores) mixes tokens.
            return rank > 2 and _multiplies_weights(node) and all(self._holds_or_is_flat(v) for v in rest[1:])
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return all(rank_of(value) == 0 for value in rest)
        if node.op_type in _NORMALIZATIONS:
            return _axis_of(node, rank, -1) == rank - 1 > 1
        if node.op_type in _REDUCTIONS:
            axes, keeps = constant_of(rest[0]) if rest else None, node.attributes.get("keepdims")
            inside = axes is not None and all(int(axis) % rank > 1 for axis in axes.reshape(-1))
            return inside and axes is not None and axes.size > 0 and (keeps is None or keeps.as_int() == 1)
        if node.op_type == "Reshape":
            target, zero = constant_of(rest[0]), node.attributes.get("allowzero")
            # Zeros copy the first two dimensions; any other target could mix tokens.
            keeps_two = target is not None and target.size > 2 and list(target[:2]) == [0, 0]
            return keeps_two and (zero is None or zero.as_int() == 0)
        return node.op_type == "Split" and _axis_of(node, rank, 0) > 1

    def _holds_or_is_flat(self, value: ir.Value) -> bool:
        """True if a scale or zero point has one entry per token, or is independent of tokens."""
        return self.hold(value) or rank_of(value) in (0, 1)

    def reader_of_padding(self, packed: Iterable[ir.Node]) -> ir.Node | None:
        """A node whose result depends on padded rows: it reads a packed value and masks nothing. None if there is
        none."""
        inside = {id(node) for node in packed}
        readers = (
            self._unmasked(use.node, use.idx, inside)
            for node in packed
            for output in node.outputs
            for use in output.uses()
        )
        return next((node for node in readers if node is not None), None)

    def _unmasked(self, node: ir.Node, place: int, inside: set[int]) -> ir.Node | None:
        if id(node) in inside or _takes_first(node, place):
            return None
        if node.op_type == "Attention" and node.domain == "":
            hides = len(node.inputs) > 3 and place < 3 and self._comes_from_mask(node.inputs[3])
            return None if hides else node
        if node.op_type == "MatMul" and node.domain == "" and self._spelled_out(node, place):
            return None
        moves = node.op_type in _MOVES | _UNARY | _BROADCAST and node.domain == ""
        follows = node.graph is self.graph and (moves or self._treats_rows(node))
        # An output with token rows is valid at padded positions by convention: they are not compared.
        seen = any(output.is_graph_output() and not self.hold(output) for output in node.outputs)
        if not follows or (seen and not _keeps_cache(node)):
            return node
        readers = [use for output in node.outputs for use in output.uses()]
        unmasked = (self._unmasked(use.node, use.idx, inside) for use in readers)
        return next((reader for reader in unmasked if reader is not None), None)

    def _spelled_out(self, product: ir.Node, place: int) -> bool:
        """True for the MatMul of queries and keys with masked scores, or for the MatMul of such a softmax with
        values."""
        weights = None if product.inputs[0] is None else product.inputs[0].producer()
        if place == 1 and weights is not None and weights.op_type == "Softmax":
            return self._hides(weights.inputs[0])
        masked = sole_user(product.outputs[0])
        softmax = None if masked is None else sole_user(masked.outputs[0])
        return softmax is not None and softmax.op_type == "Softmax" and self._hides(softmax.inputs[0])

    def _hides(self, scores: ir.Value | None) -> bool:
        """True if a value derived from the mask is added to scores."""
        add = None if scores is None else scores.producer()
        if add is None or add.op_type != "Add":
            return False
        makers = [(value, None if value is None else value.producer()) for value in add.inputs]
        return any(
            # The MatMul operand is the scores themselves; the mask is the other one.
            self._comes_from_mask(value)
            for value, maker in makers
            if maker is None or maker.op_type != "MatMul"
        )

    def _comes_from_mask(self, value: ir.Value | None) -> bool:
        pending, seen = [value], set()
        while pending:
            current = pending.pop()
            if current is self.mask:
                return True
            node = None if current is None or id(current) in seen else current.producer()
            seen.add(id(current))
            pending += [] if node is None else list(node.inputs)
        return False


def _multiplies_weights(node: ir.Node) -> bool:
    """True if a node is a MatMul with a constant matrix: stored directly, transposed, or quantized."""
    weight = node.inputs[1] if node.op_type in PRODUCTS else None
    producer = None if weight is None else weight.producer()
    stored = producer is not None and producer.op_type in _OF_WEIGHTS and is_weight_matrix(producer.inputs[0])
    return is_weight_matrix(weight) or (stored and rank_of(weight) == 2)


def _axis_of(node: ir.Node, rank: int, default: int) -> int:
    axis = node.attributes.get("axis")
    return (default if axis is None else axis.as_int()) % rank


def _keeps_cache(node: ir.Node) -> bool:
    """True if a node concatenates new keys or values with a cache: later steps mask them with the same mask."""
    return node.op_type == "Concat" and any(
        value is not None
        and value.is_graph_input()
        and value.dtype is not None
        and guess_role(value.name or "", value.dtype) is Role.CACHE
        for value in node.inputs
    )


def _takes_first(node: ir.Node, place: int) -> bool:
    """True if a node takes the first token of each text, which is always packed."""
    if node.op_type != "Gather" or node.domain != "" or place != 0:
        return False
    axis, index = node.attributes.get("axis"), constant_of(node.inputs[1])
    return axis is not None and axis.as_int() == 1 and index is not None and not index.any()
