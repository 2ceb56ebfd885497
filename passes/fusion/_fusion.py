"""The frame of every fusion: pattern, check, rewrite.

*Pattern* looks at the structure around one node and binds what it finds. *Check* looks at types, constants and other
readers, and says what is in the way. *Rewrite* builds the replacement. A place whose pattern matches is a site: it
either fires or is refused with a reason.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import onnx_ir as ir

from planish.optimizer.base import Pass, PassResult, Refusal
from planish.optimizer.graph import NAME_SCOPES, location_of, opset_of, scalar_of, sole_user

Match = TypeVar("Match")


class Declined(Exception):
    """What a check raises when a site cannot be rewritten: the reason, and the value or node in the way."""

    def __init__(self, reason: str, culprit: ir.Value | ir.Node | None = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclass(frozen=True)
class Fusion(Pass, Generic[Match]):
    """Replaces each match by what `rewrite` builds; nodes that nothing reads any more are removed."""

    root: ClassVar[str]
    """The operator that the pattern is found by."""
    since: ClassVar[int]
    """The first opset that has the operator that is written."""

    @abc.abstractmethod
    def pattern(self, node: ir.Node) -> Match | None:
        """What stands around ``node``, or None if it is not this computation."""

    @abc.abstractmethod
    def check(self, match: Match) -> None:
        """Raise Declined if the match must stay as it is."""

    @abc.abstractmethod
    def rewrite(self, match: Match) -> tuple[ir.Value, list[ir.Node]]:
        """The value to replace, and the nodes that replace it; the last one's first output takes its place."""

    def call(self, model: ir.Model) -> PassResult:
        """Visit every node of every graph once; functions stay as they are, for they have opsets of their own."""
        sites: list[str] = []
        refusals: list[Refusal] = []
        for graph in model.graphs():
            for node in [node for node in graph if node.op_type == self.root and node.domain == ""]:
                match = self.pattern(node) if node.graph is graph else None
                if match is None:
                    continue
                location = location_of(node)
                try:
                    self._check_opset(model)
                    self.check(match)
                    replace(graph, *self.rewrite(match))
                    sites.append(location)
                except Declined as declined:
                    refusals.append(Refusal.at(node, str(declined), declined.culprit))
        return PassResult(model, bool(sites), sites=sites, refusals=refusals)

    def _check_opset(self, model: ir.Model) -> None:
        if opset_of(model) < self.since:
            raise Declined(f"the model is written in opset {opset_of(model)}, the operator exists since {self.since}")


def replace(graph: ir.Graph | ir.Function, old: ir.Value, nodes: list[ir.Node]) -> None:
    """Put ``nodes`` before the producer of ``old``, let their last output replace it, remove what died."""
    producer = old.producer()
    if producer is None:
        raise ValueError(f"{old.name!r} is produced by nothing")
    new = nodes[-1].outputs[0]
    _inherit(producer, nodes)
    graph.insert_before(producer, nodes)
    name = old.name
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    remove_dead(graph, producer)
    old.name, new.name = f"{name}_replaced", name


def _inherit(source: ir.Node, nodes: list[ir.Node]) -> None:
    """Give new nodes names of their own and the source location of what they replace."""
    for index, node in enumerate(nodes):
        node.name = f"{source.name or source.outputs[0].name}_{node.op_type}_{index}"
        if NAME_SCOPES in source.metadata_props:
            node.metadata_props[NAME_SCOPES] = source.metadata_props[NAME_SCOPES]
        for output in node.outputs:
            if output.name is None:
                output.name = f"{source.outputs[0].name}_{node.op_type}_{index}"


def remove_dead(graph: ir.Graph | ir.Function, node: ir.Node) -> None:
    """Remove ``node`` if nothing reads it, and then whatever only it read."""
    pending = [node]
    while pending:
        current = pending.pop()
        if current.graph is not graph or any(out.uses() or out.is_graph_output() for out in current.outputs):
            continue
        sources = [value.producer() for value in current.inputs if value is not None]
        graph.remove(current, safe=True)
        pending += [source for source in sources if source is not None]


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value`` if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def used_by(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only reader of ``value`` if it is one of these standard operators."""
    node = sole_user(value)
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary node that is not ``value`` (``value`` itself if both are)."""
    left, right = node.inputs[0], node.inputs[1]
    return right if left is value else left if right is value else None


def with_constant(node: ir.Node | None) -> Iterator[tuple[ir.Value, float]]:
    """Each way to read a binary node as (operand, number)."""
    inputs = () if node is None else node.inputs
    if len(inputs) == 2:
        for value, constant in ((inputs[0], inputs[1]), (inputs[1], inputs[0])):
            number = scalar_of(constant)
            if value is not None and number is not None:
                yield value, number
