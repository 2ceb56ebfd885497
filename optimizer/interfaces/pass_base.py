"""Passes and their reports.

A pass is a frozen dataclass whose fields are its options. There is no second schema: names, types, bounds, defaults and
documentation are read from the class, and its text form is derived in both directions.
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
    """A site that a rewrite refused: the reason, and the culprit."""

    site: str
    """The node of the site, as described by `graph.location_of`."""
    reason: str
    culprit: str = ""
    """The value or node that violates a condition of the rewrite."""
    near: bool = False
    """True if only the core of the pattern matches: a near miss, which a changed exporter may cause."""

    @classmethod
    def at(cls, node: ir.Node, reason: str, culprit: ir.Value | ir.Node | None = None, *, near: bool = False) -> Self:
        """A refusal located at ``node``."""
        return cls(location_of(node), reason, "" if culprit is None else culprit.name or "", near)


@dataclass(frozen=True)
class TuningQuery:
    """A query for the fastest value of an option, answered by timing small graphs (`timing/tuning_table.py`)."""

    option: str
    values: tuple[Any, ...]
    """Values of the option. The first is the default without measurements, and unless another is clearly faster."""
    about: str
    """The sizes on which the latency depends, as text."""
    graph: Callable[[], ir.Model]
    """Function that creates the graph, with static sizes; the pass rewrites it with each value of the option."""


@dataclass(frozen=True)
class StatisticRequest:
    """A request for a statistic of an activation. It is collected before the pass runs; read it with
    `statistic_of(value, what)`."""

    value: ir.Value
    what: type[Observer]


_left: ContextVar[list[int] | None] = ContextVar("sites that may still be rewritten", default=None)


def admitted() -> bool:
    """True if a pass may rewrite one more site: always, except while `bisect` searches for the harmful site.

    A pass with sites calls this before each rewrite, and skips the site if it is False.
    """
    left = _left.get()
    if left is None:
        return True
    # Counted below zero: bisect reads the number of further sites from it.
    left[0] -= 1
    return left[0] >= 0


@contextmanager
def at_most(sites: int) -> Iterator[list[int]]:
    """Limit passes in the block to ``sites`` rewrites; the list holds the number of rewrites left, negative beyond the
    limit."""
    left = [sites]
    token = _left.set(left)
    try:
        yield left
    finally:
        _left.reset(token)


@dataclass
class PassResult(ir.passes.PassResult):
    """Result of a pass: the model, a change flag, the rewritten sites, the refusals, and facts."""

    sites: list[str] = field(default_factory=list)
    """One entry per rewritten site."""
    refusals: list[Refusal] = field(default_factory=list)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    """Deterministic figures, which are written to the manifest."""


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """One step of a pipeline. It changes a model in place and reports the change.

    A subclass is a frozen dataclass with a ``name`` (a kebab-case verb phrase); each field is an option with a type, a
    default and a docstring of its own. Passes do no input or output.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = OPTIONS_CONFIG
    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """True if the rewrite keeps every output up to rounding errors. Other passes are checked against the accuracy
    budget instead of the noise floor."""

    @property
    def fixed(self) -> Mapping[str, int]:
        """Static sizes of axes after the pass, by name."""
        return {}

    def tuning_queries(self, model: ir.Model, sizes: Mapping[str, int]) -> Sequence[TuningQuery]:
        """Queries that are answered before the pass runs on ``model``, for these sizes of its axes."""
        return ()

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """Statistics of activations of ``model`` that are collected before the pass runs on it."""
        return ()

    @property
    def is_adaptive(self) -> bool:
        """True if the result may depend on the target or on calibration data."""
        return type(self).tuning_queries is not Pass.tuning_queries or type(self).statistics is not Pass.statistics

    @property
    def observes(self) -> bool:
        """True if the pass may request statistics of activations."""
        return type(self).statistics is not Pass.statistics

    def consume(self, model: ir.Model) -> None:
        """Use the collected statistics. Called after each group of requests, before large observers are dropped."""

    def __str__(self) -> str:
        """The text form, without options that have their default."""
        return option_text.format_dataclass(self.name, self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Create the pass from option texts; UsageError with the option, the given text and the accepted values."""
        return option_text.build(cls, options, owner=f"pass {cls.name}")
