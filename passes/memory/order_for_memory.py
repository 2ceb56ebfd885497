"""Reorder nodes for a lower peak of memory.

Before:  a = Exp (x);  b = Exp (y);  c = ReduceSum (a);  d = ReduceSum (b);  r = Add (c, d)    (a and b live together)
After:   a = Exp (x);  c = ReduceSum (a);  b = Exp (y);  d = ReduceSum (b);  r = Add (c, d)

The peak is that of a runtime which executes nodes in file order and frees a value after its last reader (in ONNX
Runtime: `execution_order=PRIORITY_BASED`). Greedy list scheduling (Kahn 1962, "Topological sorting of large networks")
by the change of live memory at each node; the new order is kept only if its peak is lower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal
from planish.optimizer.ir.graph import location_of
from planish.passes.memory._sizes import sizes_of_values


@dataclass(frozen=True)
class OrderForMemory(Pass):
    """Reorder the main graph for a lower peak of live activations at the given sizes; never a higher one."""

    name: ClassVar[str] = "order-for-memory"

    shape: tuple[str, ...] = ("batch:1", "sequence:128")
    """Sizes of the dynamic axes, as `axis:size`; other axes have size 1."""

    def call(self, model: ir.Model) -> PassResult:
        """Compute an order, compare the peaks, and keep the lower one."""
        sizes, unknown = sizes_of_values(model, self._axes())
        given = list(model.graph)
        plan = _Plan(model.graph, sizes)
        order = plan.greedy()
        before, after = plan.peak(given), plan.peak(order)
        better = after < before
        facts: dict[str, float | int | str] = {
            "peak_bytes_before": before,
            "peak_bytes_after": min(before, after),
            "lower_bound_bytes": plan.lower_bound(),
            "values_of_unknown_size": unknown,
        }
        # Greedy scheduling has no guarantee: the given order may be better.
        if not better:
            kept = Refusal("the whole graph", f"no order was found below the peak of {before} bytes that it has")
            return PassResult(model, modified=False, refusals=[kept], facts=facts)
        moved = [location_of(node) for node, other in zip(order, given, strict=True) if node is not other]
        model.graph.remove(given)
        model.graph.extend(order)
        return PassResult(model, modified=True, sites=moved, facts=facts)

    def _axes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for text in self.shape:
            name, _, size = text.partition(":")
            if not size.isdigit() or int(size) < 1:
                raise UsageError(f"cannot read the size {text!r}", where=f"pass {self.name}", advice="write axis:size")
            sizes[name] = int(size)
        return sizes


class _Plan:
    """Liveness: values that each node reads and computes, their sizes, and their last readers."""

    def __init__(self, graph: ir.Graph, sizes: Mapping[int, int]) -> None:
        self.nodes = list(graph)
        self.position = {id(node): index for index, node in enumerate(self.nodes)}
        self.sizes = sizes
        self.stays = {id(value) for value in graph.outputs}
        self.makes = {id(node): [id(out) for out in node.outputs] for node in self.nodes}
        computed = {value for values in self.makes.values() for value in values}
        # Sorted, so that the order of a set does not affect the result.
        self.reads = {id(node): sorted({id(v) for v in _read_by(node)} & computed, key=str) for node in self.nodes}
        self.readers: dict[int, int] = dict.fromkeys(computed, 0)
        for values in self.reads.values():
            for value in values:
                self.readers[value] += 1

    def peak(self, order: Sequence[ir.Node]) -> int:
        """Maximum of live bytes for this order of nodes."""
        left = dict(self.readers)
        alive = highest = 0
        for node in order:
            alive += self._made(node)
            highest = max(highest, alive)
            alive -= self._freed(node, left)
        return highest

    def lower_bound(self) -> int:
        """A lower bound of the peak: inputs and outputs of one node are live together."""
        return max(
            (self._made(node) + sum(self.sizes.get(v, 0) for v in self.reads[id(node)]) for node in self.nodes),
            default=0,
        )

    def greedy(self) -> list[ir.Node]:
        """Run the ready node with the smallest live memory afterwards; ties keep the given order."""
        left = dict(self.readers)
        waiting = {id(node): len(self.reads[id(node)]) for node in self.nodes}
        users: dict[int, list[ir.Node]] = {}
        for node in self.nodes:
            for value in self.reads[id(node)]:
                users.setdefault(value, []).append(node)
        ready = [node for node in self.nodes if not waiting[id(node)]]
        order: list[ir.Node] = []
        while ready:
            # The position breaks ties, so that equal graphs get equal orders.
            node = min(ready, key=lambda n: (self._made(n) - self._would_free(n, left), self.position[id(n)]))
            ready.remove(node)
            order.append(node)
            self._freed(node, left)
            for value in self.makes[id(node)]:
                for user in users.get(value, ()):
                    waiting[id(user)] -= 1
                    if not waiting[id(user)]:
                        ready.append(user)
        return order

    def _made(self, node: ir.Node) -> int:
        return sum(self.sizes.get(value, 0) for value in self.makes[id(node)])

    def _would_free(self, node: ir.Node, left: Mapping[int, int]) -> int:
        dying = [v for v in self.reads[id(node)] if left[v] == 1 and v not in self.stays]
        # An output without readers is freed at once.
        unread = [v for v in self.makes[id(node)] if not self.readers[v] and v not in self.stays]
        return sum(self.sizes.get(value, 0) for value in (*dying, *unread))

    def _freed(self, node: ir.Node, left: dict[int, int]) -> int:
        freed = self._would_free(node, left)
        for value in self.reads[id(node)]:
            left[value] -= 1
        return freed


def _read_by(node: ir.Node) -> list[ir.Value]:
    """Values that a node reads, also in its subgraphs."""
    inner = [
        value
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for graph in ([attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else attribute.as_graphs())
        for inside in graph.all_nodes()
        for value in inside.inputs
        if value is not None
    ]
    return [value for value in node.inputs if value is not None] + inner
