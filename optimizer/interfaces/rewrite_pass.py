"""Rewrite passes: a pattern, a check with reasons, and a replacement."""

from __future__ import annotations

import abc
import reprlib
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import onnx_ir as ir

from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.edit import copy_location, remove_dead
from planish.optimizer.ir.graph import location_of, opset_of

Match = TypeVar("Match")


class Refused(Exception):
    """Raised by a check for a site that cannot be rewritten: the reason, and the culprit."""

    def __init__(self, reason: str, culprit: ir.Value | ir.Node | None = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


class NearMiss(Refused):
    """Raised by a pattern that matches the core of the computation only."""


@dataclass(frozen=True)
class RewritePass(Pass, Generic[Match]):
    """Replaces each match by the nodes of `rewrite`, and removes unused nodes."""

    root: ClassVar[str]
    """The operator at which the pattern starts."""
    since: ClassVar[int]
    """The first opset with the operator that is written."""

    @abc.abstractmethod
    def pattern(self, node: ir.Node) -> Match | None:
        """The match at ``node``, or None; NearMiss if only the core of the computation matches."""

    @abc.abstractmethod
    def check(self, match: Match) -> None:
        """Raise Refused if the match must stay."""

    @abc.abstractmethod
    def rewrite(self, match: Match) -> tuple[ir.Value, list[ir.Node]]:
        """The value to replace, and the new nodes; the first output of the last node replaces it."""

    def call(self, model: ir.Model) -> PassResult:
        """Visit every node of every graph once. Functions are skipped, since they have opsets of their own."""
        sites: list[str] = []
        refusals: list[Refusal] = []
        for graph in model.graphs():
            for node in [node for node in graph if node.op_type == self.root and node.domain == ""]:
                location = location_of(node)
                try:
                    # An earlier rewrite may have removed the node.
                    if node.graph is graph and self._fire(model, graph, node):
                        sites.append(location)
                except Refused as declined:
                    near = isinstance(declined, NearMiss)
                    refusals.append(Refusal.at(node, str(declined), declined.culprit, near=near))
        return PassResult(model, bool(sites), sites=sites, refusals=refusals)

    def _fire(self, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node) -> bool:
        """Match and replace at one node; True if it was replaced."""
        match = self.pattern(node)
        if match is None:
            return False
        # After the pattern: models of older opsets report refusals only for matching sites.
        self._check_opset(model)
        self.check(match)
        if not admitted():
            return False
        old, nodes = self._replacement(match)
        replace(graph, old, nodes)
        return True

    def _replacement(self, match: Match) -> tuple[ir.Value, list[ir.Node]]:
        """The value and the nodes that `rewrite` returns; UsageError for its author if they replace nothing."""
        returned: object = self.rewrite(match)
        old, nodes = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, [])
        is_new = isinstance(nodes, list) and nodes and all(isinstance(node, ir.Node) for node in nodes)
        if is_new and isinstance(old, ir.Value) and old.producer() is not None:
            return old, nodes
        raise UsageError(
            f"rewrite() returns {reprlib.repr(returned)}, not (output of a node that is replaced, [new node, ...])",
            where=f"pass {self.name} ({type(self).__module__}:{type(self).__name__})",
            advice="mend the pass",
        )

    def _check_opset(self, model: ir.Model) -> None:
        if opset_of(model) < self.since:
            raise Refused(f"the model is written in opset {opset_of(model)}, the operator exists since {self.since}")


def replace(graph: ir.Graph | ir.Function, old: ir.Value, nodes: list[ir.Node]) -> None:
    """Insert ``nodes`` before the producer of ``old``, replace ``old`` by their last output, and remove unused nodes.

    A computation may begin in ``graph`` and end in a subgraph: the graph of the producer is changed.
    """
    producer = old.producer()
    if producer is None:
        raise ValueError(f"{old.name!r} is produced by nothing")
    graph = producer.graph or graph
    new = nodes[-1].outputs[0]
    _inherit(producer, nodes)
    graph.insert_before(producer, nodes)
    # Consumers outside of the graph find the value by its name.
    name = old.name
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    remove_dead(graph, producer)
    old.name, new.name = f"{name}_replaced", name


def _inherit(source: ir.Node, nodes: list[ir.Node]) -> None:
    """Set unique names of new nodes, and the source location of the replaced node."""
    for index, node in enumerate(nodes):
        node.name = f"{source.name or source.outputs[0].name}_{node.op_type}_{index}"
        copy_location(source, node)
        for output in node.outputs:
            if output.name is None:
                output.name = f"{source.outputs[0].name}_{node.op_type}_{index}"
