"""Options of `planish run` that an engine, or the way in which it is asked, would not look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

from planish.optimizer.errors import UsageError

_DRAWN = ("top_k", "top_p", "seed")
_WRITTEN = ("most", "temperature", *_DRAWN)


def refuse_idle(context: click.Context, answerer: Any) -> None:
    """UsageError for the first option on the command line that does not apply to an opened engine."""
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name is not None and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    reasons = dict(_reasons(context.params, answerer))
    for parameter in given:
        if parameter.name in reasons:
            raise UsageError(reasons[parameter.name], where=parameter.opts[0], advice="leave it out")


def _reasons(options: dict[str, Any], answerer: Any) -> Iterator[tuple[str, str]]:
    """Why options, by name, do not apply: the last reason for an option counts."""
    from planish.optimizer.inference.text_generation import TextGenerator

    writes, task = isinstance(answerer, TextGenerator), getattr(answerer, "task", None)
    if options["temperature"] == 0:
        yield from dict.fromkeys(_DRAWN, "nothing is drawn without --temperature").items()
    if not writes:
        yield from dict.fromkeys(_WRITTEN, "this engine does not go on with a text").items()
    if str(options["source"]) != "-":
        yield "kind", "it is for standard input: the name of a file tells what it holds"
    if options["text"] is not None:
        yield "batch", "a single text is asked for"
    if writes or task is None:
        yield "pair", "this engine takes no second text"
    if task == "multiple-choice":
        yield "pair", "this engine chooses: give --choice"
    if task != "multiple-choice":
        yield "choices", "this engine does not choose among answers"
    if options["source"] is not None:
        yield from dict.fromkeys(("pair", "choices"), "every line of --input has its own").items()
