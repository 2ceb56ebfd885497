"""What is asked of an engine for texts: a file of them, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.errors import BadInput


@dataclass(frozen=True)
class Question:
    """One thing to answer: a text, and where the task needs it a second text or several choices."""

    text: str
    pair: str | None = None
    choices: tuple[str, ...] = ()


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a file: a text a line (`.txt`), or an object a line (`.jsonl`).

    Objects have `text` and, by task, `question` and `context`, `pair`, or `choices`. BadInput names the bad line.
    """
    if not path.is_file():
        raise BadInput("there is no such file", where=path)
    if path.suffix == ".npz":
        raise BadInput("this engine takes texts, not arrays", where=path, advice="give a .txt or .jsonl file")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _question(line, path, number) if path.suffix == ".jsonl" else Question(line.rstrip("\n"))


def _question(line: str, path: Path, number: int) -> Question:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError:
        raise BadInput("this line is not JSON", where=where) from None
    record = {"text": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise BadInput("this line is neither a text nor an object", where=where)
    text, pair = record.get("text", record.get("question")), record.get("pair", record.get("context"))
    choices = record.get("choices", [])
    if not isinstance(text, str) or not isinstance(pair, str | None) or not isinstance(choices, list):
        raise BadInput("this line has no field 'text' (or 'question' and 'context')", where=where)
    return Question(text, pair, tuple(map(str, choices)))
