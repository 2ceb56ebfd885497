"""Shell completion of targets, presets, passes, metrics and tasks, also inside texts of pipelines.

Runtimes and torch are not imported: the shell runs this at every press of the Tab key.
"""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem


def complete_passes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The name of one pass."""
    from planish.optimizer.interfaces import registry

    return _beginning("", incomplete, registry.table(registry.PASSES))


def complete_pipeline(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The last name of a list of passes that is being written."""
    from planish.optimizer.interfaces import registry

    begun, comma, last = incomplete.rpartition(",")
    return _beginning(begun + comma, last, registry.table(registry.PASSES))


def complete_targets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The name of a target."""
    from planish.optimizer.interfaces import registry

    return _beginning("", incomplete, registry.table(registry.BACKENDS))


def complete_presets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The name of a preset."""
    from planish.optimizer.pipeline import presets

    return _beginning("", incomplete, presets.PRESETS)


def complete_budget(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A metric, and the relation that goes with it."""
    from planish.optimizer.fidelity.metrics import METRICS, relation_of

    return _beginning("", incomplete, [f"{metric}{relation_of(metric)}" for metric in METRICS])


def complete_tasks(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The name of a task."""
    from planish.optimizer.lowering.components.tasks import TASKS

    return _beginning("", incomplete, TASKS)


def complete_expectation(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The name of a pass that must fire."""
    from planish.optimizer.interfaces import registry

    return _beginning("", incomplete, [f"{name}=" for name in registry.table(registry.PASSES)])


def _beginning(before: str, incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(before + name) for name in names if name.startswith(incomplete)]
