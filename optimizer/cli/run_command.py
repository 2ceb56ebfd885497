"""`planish run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planish.optimizer.cli.failures import refuse_closed_output
from planish.optimizer.cli.options import existing, json_flag, print_json
from planish.optimizer.errors import BadInput, UsageError, printable
from planish.optimizer.system import interrupts
from planish.optimizer.system.json_files import check_value

if TYPE_CHECKING:
    from planish.optimizer.inference.task import Task

_SHOWN = 6
"""Values of an embedding that are printed."""
_STREAM = "-"
"""Instead of a file: standard input or output."""


@click.command("run")
@click.argument("engine", type=existing)
@click.option("--text", help="One text to answer.")
@click.option("--pair", help="The second text: the context of a question, the other sentence of a pair.")
@click.option(
    "--choice", "choices", multiple=True, help="One of several answers to choose from; may be given several times."
)
@click.option(
    "--input",
    "source",
    type=existing,
    help="A .txt or .jsonl file of texts ('-': standard input); .npz for images and speech.",
)
@click.option(
    "--output",
    type=existing,
    help="The .jsonl file to write ('-': standard output); an interrupted run goes on where it stopped.",
)
@click.option(
    "--format",
    "line_format",
    type=click.Choice(["txt", "jsonl"]),
    default="txt",
    show_default=True,
    help="What the lines of standard input are.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Texts or rows that run together."
)
@click.option("--target", metavar="NAME[{k=v …}]", help="Which engine of an output, with its options.")
@click.option(
    "--prompt", metavar="NAME", help="A prompt of the checkpoint's, such as query, before each embedded text."
)
@click.option("--logits", is_flag=True, help="Scores as the model's head gives them: no softmax, no sigmoid.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Most tokens that an engine writes (64 for texts).")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="Sample instead of taking the best.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Sample among this many of the best.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Sample among the likeliest.")
@click.option("--seed", type=int, default=0, show_default=True, help="What the drawing of samples starts from.")
@json_flag
def command(
    engine: Path,
    text: str | None,
    source: Path | None,
    output: Path | None,
    target: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Ask ENGINE (an output or an engine folder): labels, embeddings, answers, texts, by its task."""
    from planish.optimizer.cli.run_options import refuse_idle
    from planish.optimizer.inference.answer_options import AnswerFields, AnswerOptions
    from planish.optimizer.inference.session import open_task, with_options

    if (text is None) == (source is None) or (source is None) != (output is None):
        raise UsageError("give either --text, or --input and --output")
    if str(output or _STREAM) == _STREAM:
        refuse_closed_output()
    pair, choices = given["pair"], given["choices"]
    for option, value in (("--text", text), ("--pair", pair), *(("--choice", choice) for choice in choices)):
        check_value(value, option)
    task = open_task(engine, target)
    refuse_idle(click.get_current_context(), task)
    task = with_options(task, AnswerOptions.of({name: given[name] for name in AnswerFields.__annotations__}))
    if text is not None and task.array_names:
        names = " and ".join(task.array_names)
        raise UsageError(
            f"this engine takes {names}, not texts", where="--text", advice="give --input FILE.npz and --output FILE"
        )
    for note in task.notes:
        click.echo(f"planish: note: {note}", err=True)
    if text is not None:
        _answer_text(task, text, pair, choices, as_json)
    elif source is not None and output is not None:
        _answer_lines(task, source, output, given["line_format"], given["batch"], as_json)


def _answer_text(task: Task, text: str, pair: str | None, choices: tuple[str, ...], as_json: bool) -> None:
    """Answer one text; show the parts of the answer as they come if the task gives parts."""
    from planish.optimizer.inference.requests import TextRequest

    parts = None if as_json else task.stream(text)
    if parts is not None:
        for part in parts:
            print(part, end="", flush=True)
        return
    (answer,) = task.answer([TextRequest(text, pair, choices)])
    if as_json:
        print_json(answer)
    else:
        click.echo("\n".join(_lines(answer)))


def _answer_lines(task: Task, source: Path, output: Path, line_format: str, batch: int, as_json: bool) -> None:
    """Answer a file or standard input, into a file or standard output."""
    from planish.optimizer.inference.answer_files import answer_lines
    from planish.optimizer.inference.requests import parse_texts
    from planish.optimizer.system.scratch import scratch_folder

    piped = str(source) == _STREAM
    if piped and task.array_names:
        raise UsageError("arrays come from a file", where="--input -", advice="give an .npz file")
    if str(output) == _STREAM:
        objects = line_format == "jsonl"
        requests = parse_texts(sys.stdin.buffer, "standard input", objects=objects) if piped else task.requests(source)
        for lines in answer_lines(task, requests, batch):
            click.echo("".join(lines), nl=False)
            sys.stdout.flush()
        return
    if not piped:
        count = _answer_file(task, source, output, batch)
    else:
        with scratch_folder() as folder:  # a file is read twice, a pipe is not
            copy = folder / f"input.{line_format}"
            copy.write_bytes(sys.stdin.buffer.read())
            try:
                count = _answer_file(task, copy, output, batch)
            except BadInput as error:
                where = error.where and error.where.replace(str(copy), "standard input")
                raise BadInput(error.what, where=where, advice=error.advice) from error
    click.echo(json.dumps({"answered": count, "output": str(output)}) if as_json else f"{count} answers: {output}")


def _answer_file(task: Task, source: Path, output: Path, batch: int) -> int:
    from planish.optimizer.cli.display import progress_bar
    from planish.optimizer.inference.answer_files import answer_file, kept_answers, partial_file

    total = sum(1 for _ in task.requests(source))
    partial = partial_file(task, source, output)

    def keep(done: int) -> None:
        interrupts.keep(f"{done} of {total} answers are kept in {partial}; run again to go on")

    if earlier := kept_answers(partial):
        keep(earlier)
    with progress_bar() as report:

        def answered(done: int) -> None:
            keep(done)
            report("answering", done - 1, total)

        return answer_file(task, source, output, batch, answered, partial)


def _lines(answer: dict[str, Any]) -> list[str]:
    """An answer for people: numbers shortened, long vectors by their beginning."""
    if "embedding" in answer:
        values = answer["embedding"]
        start = ", ".join(f"{value:.4f}" for value in values[:_SHOWN])
        return [f"embedding of {len(values)} values: [{start}, …]"] + (
            ["(the text was cut)"] if answer.get("truncated") else []
        )
    return [f"{key}: {_text(value)}" for key, value in answer.items()]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{printable(str(key))} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "".join(f"\n  {_text(inner)}" for inner in value)
    return printable(str(value))
