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

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import name_nodes
from planish.optimizer.ir.graph import location_of
from planish.optimizer.ir.program import SUM, Role, guess_role
from planish.passes.pruning._tokens import PRODUCTS, Tokens

_Axes = tuple[int | ir.SymbolicDim, int | ir.SymbolicDim]
_NAME = "remove_padding"
_TOKENS = "tokens"
"""The axis of the tokens of all texts, concatenated."""


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Run row-wise operators on tokens without padding; only attention gets padded batches.

    1. Required: an input that is a mask of shape (batch, sequence), and attention masked by it.
    2. Packed: MatMuls with weights, normalizations, activations and sums between attentions.
    3. A graph is unchanged if packed values have readers other than masked attention, first-token selection and
       outputs.
    4. A mask over past and new tokens has the new tokens at its end. A cache holds another token's values at padded
       positions: the mask hides them in every later step.
    """

    name: ClassVar[str] = "remove-padding"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph, if it has a mask."""
        graph, result = model.graph, PassResult(model, modified=False)
        mask = _mask_of(graph)
        axes = None if mask is None else _axes_of_tokens(graph, mask)
        if mask is None or axes is None:
            return result
        tokens = Tokens(graph, mask, axes)
        nodes = list(tokens.worthwhile())
        if not nodes:
            return result
        first = next(node for node in nodes if node.op_type in PRODUCTS)
        culprit = tokens.reader_of_padding(nodes)
        if culprit is not None:
            reason = "what is computed of padded tokens is read by something other than masked attention"
            result.refusals.append(Refusal.at(first, reason, culprit))
        elif admitted():
            _Packing(graph, mask, axes).apply(nodes, tokens)
            result.sites.append(location_of(first))
        result.modified = bool(result.sites)
        return result


def _mask_of(graph: ir.Graph) -> ir.Value | None:
    """The mask input, with separate batch and token axes."""
    for value in graph.inputs:
        dims = [] if value.shape is None else list(value.shape)
        named = len(dims) == 2 and all(isinstance(dim, ir.SymbolicDim) and dim.value for dim in dims)
        # Equal names of both axes would make batch and sequence indistinguishable in other values.
        if not named or dims[0] == dims[1] or value.dtype is None:
            continue
        whole = value.dtype.is_integer() or value.dtype == ir.DataType.BOOL
        if whole and guess_role(value.name or "", value.dtype) is Role.MASK:
            return value
    return None


def _axes_of_tokens(graph: ir.Graph, mask: ir.Value) -> _Axes | None:
    """The token axes of the mask or of its end: of the mask itself, or of an input of new tokens."""
    if mask.shape is None or not isinstance(mask.shape[1], ir.SymbolicDim) or mask.shape[1].value is None:
        return None
    parts = mask.shape[1].value.split(SUM)
    if len(parts) == 1:
        return mask.shape[0], mask.shape[1]
    shapes = [value.shape for value in graph.inputs if value.dtype is not None and value.dtype.is_integer()]
    fitting = (shape for shape in shapes if shape is not None and len(shape) == 2 and shape[0] == mask.shape[0])
    return next(((s[0], s[1]) for s in fitting if isinstance(s[1], ir.SymbolicDim) and s[1].value in parts), None)


class _Packing:
    """Builder of the indices (once), and of the moves between padded and packed form."""

    def __init__(self, graph: ir.Graph, mask: ir.Value, axes: _Axes) -> None:
        self._graph = graph
        self._packed: dict[int, ir.Value] = {}
        self._places, self._ranks = self._indices(mask, axes)

    def apply(self, nodes: list[ir.Node], tokens: Tokens) -> None:
        """Redirect these nodes to packed rows."""
        inside = {id(node) for node in nodes}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and tokens.hold(value) and id(value.producer()) not in inside:
                    node.replace_input_with(index, self._pack(value, node))
        for node in nodes:
            for output in node.outputs:
                self._unpack(output, node, inside)

    def _indices(self, mask: ir.Value, axes: _Axes) -> tuple[ir.Value, ir.Value]:
        """Positions of tokens in the flattened batch, and the index of each position among the tokens.

        Shapes are (tokens,) and (batch, sequence); padding has the index of the last token before it. The first token
        of each text is always packed: then no tensor is empty, and readers of first tokens are correct.
        """
        tape = ir.tape.Tape()
        mask = self._of_new_tokens(tape, mask, axes)
        boolean, whole = {"to": int(ir.DataType.BOOL)}, {"to": int(ir.DataType.INT64)}
        zero, one, end, line = (_constant(tape, [n]) for n in (0, 1, np.iinfo(np.int64).max, -1))
        # A text without tokens would leave no row for its first token, which a pooler reads.
        first = tape.op("Slice", [mask, zero, one, one])
        always = tape.op("Equal", [first, first])
        others = tape.op("Cast", [tape.op("Slice", [mask, one, end, one])], boolean)
        counted = tape.op("Concat", [always, others], {"axis": 1})
        flags = tape.op("Cast", [tape.op("Reshape", [counted, line])], whole)
        places = tape.op("Reshape", [tape.op("NonZero", [flags]), line])
        until = tape.op("CumSum", [flags, _constant(tape, 0)])
        # CumSum counts from 1; padding after a token gets that token's index.
        ranks = tape.op("Reshape", [tape.op("Sub", [until, one]), tape.op("Shape", [mask])])
        name_nodes(tape.nodes, _NAME)
        self._graph.insert_before(next(iter(self._graph)), tape.nodes)
        return places, ranks

    def _of_new_tokens(self, tape: ir.tape.Tape, mask: ir.Value, axes: _Axes) -> ir.Value:
        """The end of a mask over past and new tokens."""
        if mask.shape is None or mask.shape[1] == axes[1]:
            return mask
        new = next(v for v in self._graph.inputs if v.shape is not None and tuple(v.shape) == axes)
        count = tape.op("Shape", [new], {"start": 1, "end": 2})
        end, line = (_constant(tape, [n]) for n in (np.iinfo(np.int64).max, 1))
        return tape.op("Slice", [mask, tape.op("Neg", [count]), end, line])

    def _pack(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """(batch, sequence, …) as (1, tokens, …)."""
        if id(value) not in self._packed and value.shape is not None:
            rest = [dim for dim in value.shape[2:] if isinstance(dim, int)]
            tape = ir.tape.Tape()
            flat = tape.op("Reshape", [value, _constant(tape, [1, -1, *rest])])
            packed = tape.op("Gather", [flat, self._places], {"axis": 1})
            packed.shape, packed.type = ir.Shape([1, _TOKENS, *rest]), value.type
            name_nodes(tape.nodes, f"{value.name}_pack")
            self._graph.insert_before(reader, tape.nodes)
            self._packed[id(value)] = packed
        return self._packed[id(value)]

    def _unpack(self, value: ir.Value, maker: ir.Node, inside: set[int]) -> None:
        """Give (batch, sequence, …) to all readers of ``value`` that are not packed."""
        # Collected before the Gather is inserted, which reads the value too.
        outside = [use for use in value.uses() if id(use.node) not in inside]
        padded = value.shape
        if padded is None:
            raise ValueError(f"{value.name!r} has no shape")
        # Set even without outside readers: later passes must not take it for a padded batch.
        value.shape = ir.Shape([1, _TOKENS, *padded[2:]])
        if not outside and not value.is_graph_output():
            return
        tape = ir.tape.Tape()
        restored = tape.op("Squeeze", [tape.op("Gather", [value, self._ranks], {"axis": 1}), _constant(tape, [0])])
        restored.shape, restored.type = padded, value.type
        name_nodes(tape.nodes, f"{value.name}_unpack")
        self._graph.insert_after(maker, tape.nodes)
        for use in outside:
            use.node.replace_input_with(use.idx, restored)
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = restored
                name = value.name
                value.name, restored.name = f"{name}_{_TOKENS}", name


def _constant(tape: ir.tape.Tape, numbers: int | list[int]) -> ir.Value:
    """An integer, or a vector of integers."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
