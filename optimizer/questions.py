"""What is asked of an engine for texts: a file of them, one a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput
from planish.optimizer.json_files import parse_json
from planish.optimizer.text_files import decoded_lines


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

    Objects have `text` and, by task, `question` and `context`, `pair`, or `choices`, and may have an `id`. BadInput
    names the bad line.
    """
    if not path.is_file():
        raise BadInput("there is no such file", where=path)
    if path.suffix == ".npz":
        raise BadInput("this engine takes texts, not arrays", where=path, advice="give a .txt or .jsonl file")
    with path.open("rb") as file:
        yield from parse_questions(file, path, objects=path.suffix == ".jsonl")


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
    text, pair = record.get("text", record.get("question")), record.get("pair", record.get("context"))
    choices = record.get("choices", [])
    if not isinstance(text, str) or not isinstance(pair, str | None) or not isinstance(choices, list):
        raise BadInput("this line has no field 'text' (or 'question' and 'context')", where=where)
    return Question(text, pair, tuple(map(str, choices)), record.get("id"))
