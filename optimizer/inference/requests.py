"""What is asked of an engine for texts: a file of them, one a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput
from planish.optimizer.system.json_files import parse_json
from planish.optimizer.system.text_lines import decoded_lines

_ONE_TEXT = frozenset({"text-generation", "text2text-generation"})
"""Tasks that take a single text."""


@dataclass(frozen=True)
class Question:
    """One thing to answer: a text, and where the task needs it a second text or several choices."""

    text: str
    pair: str | None = None
    choices: tuple[str, ...] = ()
    id: Any = None
    """The user's own name for it, which comes back with the answer; any JSON value."""
    index: int | None = None
    """Its line in the file, counted from 0: blank lines ask nothing, but count. None if it stands in no file."""


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a file: a text a line (`.txt`), or an object a line (`.jsonl`).

    Objects have `text` and, by task, `question` and `context`, `pair` (or `text_pair`), or `choices`, and may have an
    `id`; other fields are not looked at. BadInput names the bad line.
    """
    if not path.is_file():
        raise BadInput("this is a folder" if path.is_dir() else "there is no such file", where=path)
    if path.suffix == ".npz":
        raise BadInput("this engine takes texts, not arrays", where=path, advice="give a .txt or .jsonl file")
    with path.open("rb") as file:
        yield from parse_questions(file, path, objects=path.suffix == ".jsonl")


def refuse_idle_fields(question: Question, task: str | None) -> Question:
    """The question; BadInput if it has a field that an engine for ``task`` would not look at."""
    idle = {
        "choices": question.choices and task != "multiple-choice",
        "pair": question.pair and (task in _ONE_TEXT or task == "multiple-choice"),
    }
    for name in (name for name, told in idle.items() if told):
        where = None if question.index is None else f"line {question.index + 1}"
        raise BadInput(f"an engine for {task} does not look at {name}", where=where, advice="leave it out")
    return question


def parse_questions(lines: Iterable[bytes], where: object, *, objects: bool) -> Iterator[Question]:
    """Questions of lines of text: one each, or a JSON object each."""
    for number, line in decoded_lines(lines, where):
        question = _question(line, f"{where}, line {number}") if objects else Question(line)
        yield replace(question, index=number - 1)


def _question(line: str, where: str) -> Question:
    record = parse_json(line, where)
    record = {"text": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise BadInput("this line is neither a text nor an object", where=where)
    text = record.get("text", record.get("question"))
    pair = record.get("pair", record.get("text_pair", record.get("context")))
    choices = record.get("choices", [])
    if not isinstance(text, str) or not isinstance(pair, str | None) or not isinstance(choices, list):
        raise BadInput("this line has no field 'text' (or 'question' and 'context')", where=where)
    return Question(text, pair, tuple(map(str, choices)), record.get("id"))
