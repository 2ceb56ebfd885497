"""Compute on the tokens that count, and put padding back only where texts must stand side by side.

Before:  p = MatMul (x, w);  q = Add (p, b);  …;  a = Attention (q, k, v, mask);  o = MatMul (a, wo)      x: [b,s,768]
After:   t = pack (x);  p = MatMul (t, w);  q = Add (p, b);  r = unpack (q);  …                             t: [1,n,768]
         a = Attention (r, k, v, mask);  c = pack (a);  o = MatMul (c, wo)

pack    = Reshape to (1, b·s, …), then Gather <axis=1> of the places where the mask is not zero
unpack  = Gather <axis=1> by the place that each token has among those, then Squeeze

Everything between two attentions treats each token alone, so the tokens of all texts can follow each other as one text
without padding. Du et al. 2020, "Effective Transformer"; Zhai et al. 2023, "ByteTransformer", section III.D.

An output at a padded place holds a copy of another token's: it means as little as what stood there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.base import Pass, PassResult, Refusal, admitted
from planish.optimizer.graph import constant_of, is_weight_matrix, location_of, rank_of, sole_user
from planish.optimizer.program import Role, guess_role

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
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "MatMulIntegerToFloat"})
_NORMALIZATIONS = frozenset({"LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax"})
_REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"})
_MOVES = frozenset({
    "Concat", "Expand", "Gather", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})
# fmt: on
_DOMAINS = frozenset(("", "com.microsoft"))
_NAME = "remove_padding"
_TOKENS = "tokens"
"""The axis of the tokens of all texts, one after the other."""


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Run what treats each token alone without the padded ones; only attention sees texts side by side.

    1. Needed: an input that is a mask of shape (batch, sequence), and attention that hides what it calls padding.
    2. Packed: products with weights, normalizations, activations and sums between attentions.
    3. A graph is left alone if anything but masked attention, the first token or an output reads what is packed, and if
       it has a cache: its new tokens are few, and rarely padding.
    """

    name: ClassVar[str] = "remove-padding"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph, if it takes a mask."""
        graph, result = model.graph, PassResult(model, modified=False)
        mask = _mask_of(graph)
        if mask is None or mask.shape is None:
            return result
        tokens = _Tokens(graph, mask, (mask.shape[0], mask.shape[1]))
        nodes = list(tokens.worthwhile())
        if not nodes:
            return result
        first = next(node for node in nodes if node.op_type in _PRODUCTS)
        culprit = tokens.reader_of_padding(nodes)
        if culprit is not None:
            reason = "what is computed of padded tokens is read by something other than masked attention"
            result.refusals.append(Refusal.at(first, reason, culprit))
        elif admitted():
            _Packing(graph, mask).apply(nodes, tokens)
            result.sites.append(location_of(first))
        result.modified = bool(result.sites)
        return result


def _mask_of(graph: ir.Graph) -> ir.Value | None:
    """The input that tells tokens from padding, with axes of its own for texts and tokens."""
    for value in graph.inputs:
        dims = [] if value.shape is None else list(value.shape)
        named = len(dims) == 2 and all(isinstance(dim, ir.SymbolicDim) and dim.value for dim in dims)
        if not named or dims[0] == dims[1] or value.dtype is None:
            continue
        whole = value.dtype.is_integer() or value.dtype == ir.DataType.BOOL
        if whole and guess_role(value.name or "", value.dtype) is Role.MASK:
            return value
    return None


@dataclass(frozen=True)
class _Tokens:
    """Which values of a graph have one row for each token, and which nodes treat rows one by one."""

    graph: ir.Graph
    mask: ir.Value
    axes: tuple[int | ir.SymbolicDim, int | ir.SymbolicDim]

    def hold(self, value: ir.Value | None) -> bool:
        """Whether a value has shape (batch, sequence, numbers…)."""
        dims = [] if value is None or value.shape is None else list(value.shape)
        return len(dims) >= 2 and tuple(dims[:2]) == self.axes and all(isinstance(dim, int) for dim in dims[2:])

    def worthwhile(self) -> Iterator[ir.Node]:
        """Nodes that treat rows one by one and hang together with a product by weights, in order."""
        alone = {id(node): node for node in self.graph if self._treats_rows(node)}
        group: dict[int, set[int]] = {}
        for key, node in alone.items():
            merged = {key}
            for value in node.inputs:
                producer = value.producer() if value is not None and self.hold(value) else None
                merged |= group.get(id(producer), set())
            group.update(dict.fromkeys(merged, merged))
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
        """Whether an operand has a row for each token, or the same for all of them."""
        if value.shape is None:
            return False
        if self.hold(value):
            return len(value.shape) == rank
        return all(dim == 1 for dim in value.shape[: max(0, len(value.shape) - rank + 2)])

    def _keeps_rows_apart(self, node: ir.Node) -> bool:
        """Whether an operator with one operand of tokens mixes nothing between them."""
        rest = [value for value in node.inputs[1:] if value is not None]
        rank = rank_of(node.inputs[0]) or 0
        if any(self.hold(value) for value in rest) and node.op_type != "MatMulIntegerToFloat":
            return False
        if node.op_type in _PRODUCTS:
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
            keeps_two = target is not None and target.size > 2 and list(target[:2]) == [0, 0]
            return keeps_two and (zero is None or zero.as_int() == 0)
        return node.op_type == "Split" and _axis_of(node, rank, 0) > 1

    def _holds_or_is_flat(self, value: ir.Value) -> bool:
        """Whether a scale or zero point has one entry for each token, or none for tokens at all."""
        return self.hold(value) or rank_of(value) in (0, 1)

    def reader_of_padding(self, packed: Iterable[ir.Node]) -> ir.Node | None:
        """A node that lets padding have a say in the result, or None: reads a packed value and hides nothing."""
        inside = {id(node) for node in packed}
        found = (
            self._unmasked(use.node, use.idx, inside)
            for node in packed
            for output in node.outputs
            for use in output.uses()
        )
        return next((node for node in found if node is not None), None)

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
        if not follows or any(output.is_graph_output() and not self.hold(output) for output in node.outputs):
            return node
        readers = [use for output in node.outputs for use in output.uses()]
        found = (self._unmasked(use.node, use.idx, inside) for use in readers)
        return next((reader for reader in found if reader is not None), None)

    def _spelled_out(self, product: ir.Node, place: int) -> bool:
        """Whether this is queries times keys with a mask added to the scores, or what such a softmax weighs."""
        weights = None if product.inputs[0] is None else product.inputs[0].producer()
        if place == 1 and weights is not None and weights.op_type == "Softmax":
            return self._hides(weights.inputs[0])
        masked = sole_user(product.outputs[0])
        softmax = None if masked is None else sole_user(masked.outputs[0])
        return softmax is not None and softmax.op_type == "Softmax" and self._hides(softmax.inputs[0])

    def _hides(self, scores: ir.Value | None) -> bool:
        """Whether something that comes from the mask is added to scores."""
        add = None if scores is None else scores.producer()
        if add is None or add.op_type != "Add":
            return False
        makers = [(value, None if value is None else value.producer()) for value in add.inputs]
        return any(
            self._comes_from_mask(value) for value, maker in makers if maker is None or maker.op_type != "MatMul"
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
    """Whether a node is a product with a constant matrix, in floating point or as integers and their scales."""
    weight = node.inputs[1] if node.op_type in _PRODUCTS else None
    scaled = None if weight is None else weight.producer()
    stored = scaled is not None and scaled.op_type == "DequantizeLinear" and is_weight_matrix(scaled.inputs[0])
    return is_weight_matrix(weight) or (stored and rank_of(weight) == 2)


def _axis_of(node: ir.Node, rank: int, default: int) -> int:
    axis = node.attributes.get("axis")
    return (default if axis is None else axis.as_int()) % rank


def _takes_first(node: ir.Node, place: int) -> bool:
    """Whether a node takes the first token of each text, which is packed whatever the mask says of it."""
    if node.op_type != "Gather" or node.domain != "" or place != 0:
        return False
    axis, index = node.attributes.get("axis"), constant_of(node.inputs[1])
    return axis is not None and axis.as_int() == 1 and index is not None and not index.any()


class _Packing:
    """Writes the indices once, and the moves between the two forms where they are needed."""

    def __init__(self, graph: ir.Graph, mask: ir.Value) -> None:
        self._graph = graph
        self._packed: dict[int, ir.Value] = {}
        self._places, self._ranks = self._indices(mask)

    def apply(self, nodes: list[ir.Node], tokens: _Tokens) -> None:
        """Let these nodes work on packed rows."""
        inside = {id(node) for node in nodes}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and tokens.hold(value) and id(value.producer()) not in inside:
                    node.replace_input_with(index, self._pack(value, node))
        for node in nodes:
            for output in node.outputs:
                self._unpack(output, node, inside)

    def _indices(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Places of tokens among (batch · sequence), shape (tokens,); and the rank of each place among the tokens,
        shape (batch, sequence): that of the last token before it where there is padding.

        The first token of each text counts always: then there is one, and what reads the first of each text is right.
        """
        tape = _Tape(_NAME)
        boolean, whole = {"to": int(ir.DataType.BOOL)}, {"to": int(ir.DataType.INT64)}
        zero, one, end, line = (tape.constant([n]) for n in (0, 1, np.iinfo(np.int64).max, -1))
        first = tape.op("Slice", [mask, zero, one, one])
        always = tape.op("Equal", [first, first])
        others = tape.op("Cast", [tape.op("Slice", [mask, one, end, one])], boolean)
        counted = tape.op("Concat", [always, others], {"axis": 1})
        flags = tape.op("Cast", [tape.op("Reshape", [counted, line])], whole)
        places = tape.op("Reshape", [tape.op("NonZero", [flags]), line])
        until = tape.op("CumSum", [flags, tape.constant(0)])
        ranks = tape.op("Reshape", [tape.op("Sub", [until, one]), tape.op("Shape", [mask])])
        self._graph.insert_before(next(iter(self._graph)), tape.nodes)
        return places, ranks

    def _pack(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """(batch, sequence, …) as (1, tokens, …)."""
        if id(value) not in self._packed and value.shape is not None:
            rest = [dim for dim in value.shape[2:] if isinstance(dim, int)]
            tape = _Tape(f"{value.name}_pack")
            flat = tape.op("Reshape", [value, tape.constant([1, -1, *rest])])
            packed = tape.op("Gather", [flat, self._places], {"axis": 1})
            packed.shape, packed.type = ir.Shape([1, _TOKENS, *rest]), value.type
            self._graph.insert_before(reader, tape.nodes)
            self._packed[id(value)] = packed
        return self._packed[id(value)]

    def _unpack(self, value: ir.Value, maker: ir.Node, inside: set[int]) -> None:
        """Give (batch, sequence, …) back to all who read ``value`` and are not packed themselves."""
        outside = [use for use in value.uses() if id(use.node) not in inside]
        padded = value.shape
        if padded is None:
            raise ValueError(f"{value.name!r} has no shape")
        value.shape = ir.Shape([1, _TOKENS, *padded[2:]])
        if not outside and not value.is_graph_output():
            return
        tape = _Tape(f"{value.name}_unpack")
        restored = tape.op("Squeeze", [tape.op("Gather", [value, self._ranks], {"axis": 1}), tape.constant([0])])
        restored.shape, restored.type = padded, value.type
        self._graph.insert_after(maker, tape.nodes)
        for use in outside:
            use.node.replace_input_with(use.idx, restored)
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = restored
                name = value.name
                value.name, restored.name = f"{name}_{_TOKENS}", name


class _Tape(ir.tape.Tape):
    """New nodes in order, not yet in a graph. Their names depend on nothing that happened to the graph before."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], *rest: Any, **options: Any) -> ir.Value:
        """The output of a new node."""
        made = super().op(op_type, inputs, *rest, **options)
        made.name = f"{self._prefix}_{len(self.nodes)}"
        node = made.producer()
        if node is not None:
            node.name = made.name
        return made

    def constant(self, numbers: int | list[int]) -> ir.Value:
        """A whole number, or a line of them."""
        return self.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
