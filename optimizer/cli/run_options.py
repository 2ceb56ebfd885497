"""Options of `planish run` that have no effect on an engine, or beside other options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from planish.optimizer.errors import UsageError

if TYPE_CHECKING:
    from planish.optimizer.inference.task import Task

_SAMPLING = ("top_k", "top_p", "seed")
_GENERATION = ("max_new_tokens", "temperature", *_SAMPLING)


def refuse_idle(context: click.Context, task: Task) -> None:
    """UsageError for the first option on the command line that has no effect on an opened task."""
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name is not None and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    reasons = dict(_reasons(context.params, task))
    for parameter in given:
        if parameter.name in reasons:
            raise UsageError(reasons[parameter.name], where=parameter.opts[0], advice="leave it out")


def _reasons(values: dict[str, Any], task: Task) -> Iterator[tuple[str, str]]:
    """Options without effect and why; the last reason for an option counts."""
    from planish.optimizer.inference.answer_options import TaskOption
    from planish.optimizer.inference.requests import takes_pairs

    if values["temperature"] == 0:
        yield from dict.fromkeys(_SAMPLING, "nothing is drawn without --temperature").items()
    if TaskOption.GENERATION not in task.options:
        yield from dict.fromkeys(_GENERATION, "this engine does not go on with a text").items()
    if str(values["source"]) != "-":
        yield "line_format", "it is for standard input: the name of a file tells what it holds"
    if values["text"] is not None:
        yield "batch", "a single text is asked for"
    if not takes_pairs(task.options):
        yield "pair", "this engine takes no second text"
    if TaskOption.CHOICES in task.options:
        yield "pair", "this engine chooses: give --choice"
    else:
        yield "choices", "this engine does not choose among answers"
    if values["source"] is not None:
        yield from dict.fromkeys(("pair", "choices"), "every line of --input has its own").items()
