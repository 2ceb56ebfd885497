"""Share heads of keys and values among queries, where a graph repeats them.

Before:  u = Unsqueeze (k, {2});  e = Expand (u, {b,2,3,s,8});  k6 = Reshape (e, {b,6,s,8});  (v6 likewise)
         r = Attention (q, k6, v6, mask)
After:   r = Attention (q, k, v, mask)               q has 6 heads, k and v have 2

Ainslie et al. 2023, "GQA"; Shazeer 2019, "Fast Transformer Decoding" (one head: multi-query). ONNX: Attention, opset
23, whose query head i reads head i // (query heads / key heads), which equals repeating each head in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import NearMiss, Refused, RewritePass
from planish.optimizer.ir.graph import constant_of, producer_of

_KEY, _VALUE = 1, 2


@dataclass(frozen=True)
class Repeated:
    """Heads before their repetition, and the number of repetitions."""

    source: ir.Value
    times: int


@dataclass(frozen=True)
class Grouped:
    """A match: the attention, and the sources of repeated keys and values (None: not repeated)."""

    attention: ir.Node
    key: Repeated | None
    value: Repeated | None


@dataclass(frozen=True)
class ShareKeyHeads(RewritePass[Grouped]):
    """Give Attention the keys and values before their repetition for groups of queries."""

    name: ClassVar[str] = "share-key-heads"
    root: ClassVar[str] = "Attention"
    since: ClassVar[int] = 23

    def pattern(self, node: ir.Node) -> Grouped | None:
        """Match an attention whose keys or values are repeated."""
        key, value = _repeated(node.inputs[_KEY]), _repeated(node.inputs[_VALUE])
        if key is None and value is None:
            expanded = _expanded(node.inputs[_KEY])
            if expanded is not None:
                raise NearMiss("its keys are expanded, but not seen to repeat each head in place", expanded)
            return None
        return Grouped(node, key, value)

    def check(self, match: Grouped) -> None:
        """Check that keys and values are repeated alike, and that no cache inside would hold the repeated ones."""
        if match.key is None or match.value is None:
            lone = match.attention.inputs[_VALUE if match.value is None else _KEY]
            raise Refused("only one of its keys and values is repeated", lone)
        if match.key.times != match.value.times:
            raise Refused(f"keys are repeated {match.key.times} times, values {match.value.times}", match.key.source)
        # A cache inside the operator would have to hold fewer heads, which changes outputs of the graph.
        if len(match.attention.inputs) > 4 or len(match.attention.outputs) > 1:
            raise Refused("it holds its cache itself", match.attention)

    def rewrite(self, match: Grouped) -> tuple[ir.Value, list[ir.Node]]:
        """Build the same node with other operands."""
        if match.key is None or match.value is None:
            raise ValueError("rewrite needs a match that was checked")
        query, _, _, *mask = match.attention.inputs
        inputs = [query, match.key.source, match.value.source, *mask]
        return match.attention.outputs[0], [ir.node("Attention", inputs, dict(match.attention.attributes))]


def _expanded(value: ir.Value | None) -> ir.Node | None:
    """The Expand or Tile before a Reshape."""
    joined = producer_of(value, "Reshape")
    return None if joined is None else producer_of(joined.inputs[0], "Expand", "Tile")


def _repeated(value: ir.Value | None) -> Repeated | None:
    """(batch, heads, keys, size) of Reshape (Expand (Unsqueeze (heads, 2))), if that repeats each head in place."""
    joined = producer_of(value, "Reshape")
    expanded = producer_of(None if joined is None else joined.inputs[0], "Expand")
    raised = producer_of(None if expanded is None else expanded.inputs[0], "Unsqueeze")
    axes = None if raised is None else constant_of(raised.inputs[1])
    source = None if raised is None else raised.inputs[0]
    if joined is None or expanded is None or source is None or axes is None or list(axes.reshape(-1)) != [2]:
        return None
    shapes = [v.shape for v in (source, expanded.outputs[0], joined.outputs[0])]
    before, between, after = (None if shape is None else list(shape) for shape in shapes)
    if before is None or between is None or after is None or (len(before), len(between), len(after)) != (4, 5, 4):
        return None
    heads, times = before[1], between[2]
    # Expand before Reshape repeats each head in place; after it, heads would alternate.
    counted = isinstance(heads, int) and isinstance(times, int) and after[1] == heads * times
    others = [after[axis] == before[axis] for axis in (0, 2, 3)]  # of the same number of elements: two tell the third
    kept = [*between[:2], *between[3:]] == before and sum(others) >= 2
    return Repeated(source, times) if counted and kept and isinstance(times, int) else None
