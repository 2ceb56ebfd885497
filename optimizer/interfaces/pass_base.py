"""What a pass is, and what it reports.

A pass is a frozen dataclass whose fields are its options. There is no second schema: names, types, bounds, defaults
and documentation are read off the class, and its text form is derived from it both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import onnx_ir as ir

from planish.optimizer.interfaces import option_text
from planish.optimizer.interfaces.observers import Observer
from planish.optimizer.interfaces.option_text import OPTIONS_CONFIG
from planish.optimizer.ir.graph import location_of


@dataclass(frozen=True)
class Refusal:
    """A place where a rewrite could have applied and did not: what stood in the way, and the culprit."""

    site: str
    """The node that the rewrite is about, as `graph.location_of` describes it."""
    reason: str
    culprit: str = ""
    """The value or node that differed from what the rewrite needs."""
    near: bool = False
    """Whether only part of the pattern stands there: a near miss, which an exporter's change may have caused."""

    @classmethod
    def at(cls, node: ir.Node, reason: str, culprit: ir.Value | ir.Node | None = None, *, near: bool = False) -> Self:
        """A refusal located at ``node``."""
        return cls(location_of(node), reason, "" if culprit is None else culprit.name or "", near)


@dataclass(frozen=True)
class TuningQuery:
    """Which value of an option is fastest: to be answered by timing small graphs (`timing/tuning_table.py`)."""

    option: str
    values: tuple[Any, ...]
    """The first is taken where nothing is measured, and unless another is clearly faster."""
    about: str
    """The sizes on which the answer depends, as text."""
    graph: Callable[[], ir.Model]
    """Makes the graph, all sizes fixed; the pass with each value of the option writes one form of it."""


@dataclass(frozen=True)
class StatisticRequest:
    """An activation that a pass wants to have seen before it runs: afterwards `seen(value, what)` has it."""

    value: ir.Value
    what: type[Observer]


_left: ContextVar[list[int] | None] = ContextVar("sites that may still be rewritten", default=None)


def admitted() -> bool:
    """Whether a pass may rewrite one more site: always, except while `bisect` looks for the site that does harm.

    A pass that goes from site to site asks right before each rewrite, and leaves the site as it is if the answer is no.
    """
    left = _left.get()
    if left is None:
        return True
    left[0] -= 1
    return left[0] >= 0


@contextmanager
def at_most(sites: int) -> Iterator[list[int]]:
    """Inside, passes rewrite only their first ``sites`` sites; the list holds how many more they could have had, as a
    negative number."""
    left = [sites]
    token = _left.set(left)
    try:
        yield left
    finally:
        _left.reset(token)


@dataclass
class PassResult(ir.passes.PassResult):
    """What a pass did: the model, whether it changed, where it fired, where it refused and what it found out."""

    sites: list[str] = field(default_factory=list)
    """One entry per rewritten place."""
    refusals: list[Refusal] = field(default_factory=list)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    """Figures of interest; deterministic ones only, for they go into the manifest."""


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """One step of a pipeline: changes a model in place and says honestly whether it did.

    A subclass is a frozen dataclass with a ``name`` (a kebab-case verb phrase); each field is an option with a type,
    a default and a docstring of its own. Passes do no input or output.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = OPTIONS_CONFIG
    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether the rewrite keeps every output up to rounding; a pass that does not is held against the fidelity that was
    asked for instead of the noise floor."""

    @property
    def fixed(self) -> Mapping[str, int]:
        """Axes that have only this size after the pass, by name; an engine is asked for no other."""
        return {}

    def tuning_queries(self, model: ir.Model, sizes: Mapping[str, int]) -> Sequence[TuningQuery]:
        """What the pass wants to know of its target before it runs on ``model``, whose axes will have these sizes."""
        return ()

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """What the pass wants to have seen of activations of ``model`` before it runs on it."""
        return ()

    @property
    def is_adaptive(self) -> bool:
        """Whether what the pass does may depend on its target, or on what was seen."""
        return type(self).tuning_queries is not Pass.tuning_queries or type(self).statistics is not Pass.statistics

    @property
    def observes(self) -> bool:
        """True if the pass may request statistics of activations."""
        return type(self).statistics is not Pass.statistics

    def consume(self, model: ir.Model) -> None:
        """Use statistics just collected; called after each group of requests, before large observers are dropped."""

    def __str__(self) -> str:
        """The text form; options that have their default are left out."""
        return option_text.format_dataclass(self.name, self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the pass from option texts; UsageError names the option, what it got and what it takes."""
        return option_text.build(cls, options, owner=f"pass {cls.name}")
