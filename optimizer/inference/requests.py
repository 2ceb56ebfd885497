"""Requests to an engine: lines of text, or rows of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.answer_options import TaskOption
from planish.optimizer.ir.program import Arrays, Signature, leading_axis
from planish.optimizer.runtime.array_files import read_arrays
from planish.optimizer.system.json_files import parse_json
from planish.optimizer.system.text_lines import decoded_lines


@dataclass(frozen=True)
class TextRequest:
    """A text to answer, and where the task needs it a second text or several choices."""

    text: str
    pair: str | None = None
    choices: tuple[str, ...] = ()
    id: Any = None
    """The user's own name for it, which comes back with the answer; any JSON value."""
    index: int | None = None
    """Its line in the file, counted from 0: blank lines are no requests, but count. None if it stands in no file."""

    def idle_fields(self, options: Set[TaskOption]) -> list[str]:
        """Names of the fields that have a value and that a task with these options does not look at."""
        idle = {
            "choices": self.choices and TaskOption.CHOICES not in options,
            "pair": self.pair and not takes_pairs(options),
        }
        return [name for name, is_idle in idle.items() if is_idle]


@dataclass(frozen=True)
class ArrayRequest:
    """An image or a recording: its arrays by name, without the axis that counts them."""

    arrays: Arrays
    id: Any = None
    index: int | None = None
    """Its row in the file, counted from 0."""

    def idle_fields(self, _: Set[TaskOption]) -> list[str]:
        """Nothing: every array is an input of the engine."""
        return []


AnyRequest: TypeAlias = TextRequest | ArrayRequest


def takes_pairs(options: Set[TaskOption]) -> bool:
    """True if a text may have a second one: engines that generate go on with one, those that choose have choices."""
    return not options & {TaskOption.GENERATION, TaskOption.CHOICES}


def read_texts(path: Path) -> Iterator[TextRequest]:
    """Requests of a file: a text a line (`.txt`), or an object a line (`.jsonl`).

    Objects have `text` and, by task, `question` and `context`, `pair` (or `text_pair`), or `choices`, and may have an
    `id`; other fields are not looked at. BadInput names the bad line.
    """
    if not path.is_file():
        raise BadInput("this is a folder" if path.is_dir() else "there is no such file", where=path)
    if path.suffix == ".npz":
        raise BadInput("this engine takes texts, not arrays", where=path, advice="give a .txt or .jsonl file")
    with path.open("rb") as file:
        yield from parse_texts(file, path, objects=path.suffix == ".jsonl")


def parse_texts(lines: Iterable[bytes], where: object, *, objects: bool) -> Iterator[TextRequest]:
    """Requests of lines of text: one each, or a JSON object each."""
    for number, line in decoded_lines(lines, where):
        request = _parse_object(line, f"{where}, line {number}") if objects else TextRequest(line)
        yield replace(request, index=number - 1)


def _parse_object(line: str, where: str) -> TextRequest:
    record = parse_json(line, where)
    record = {"text": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise BadInput("this line is neither a text nor an object", where=where)
    text = record.get("text", record.get("question"))
    pair = record.get("pair", record.get("text_pair", record.get("context")))
    choices = record.get("choices", [])
    if not isinstance(text, str) or not isinstance(pair, str | None) or not isinstance(choices, list):
        raise BadInput("this line has no field 'text' (or 'question' and 'context')", where=where)
    return TextRequest(text, pair, tuple(map(str, choices)), record.get("id"))


def read_rows(path: Path, signature: Signature) -> Iterator[ArrayRequest]:
    """Images or recordings of an `.npz` file, one after the other; BadInput if it is another file or does not fit."""
    if path.suffix != ".npz":
        names = " and ".join(tensor.name for tensor in signature.inputs)
        raise BadInput(f"this engine takes {names}, not texts", where=path, advice="give an .npz file of arrays")
    counting_axis = leading_axis(signature)  # a file may hold any number of them
    axes = {name: axis for name, axis in signature.axes.items() if name != counting_axis}
    arrays = read_arrays(path, replace(signature, axes=axes))
    for index in range(len(next(iter(arrays.values())))):
        yield ArrayRequest({name: array[index] for name, array in arrays.items()}, index=index)


def stacked(requests: Sequence[ArrayRequest]) -> dict[str, np.ndarray]:
    """The arrays of several requests as one batch."""
    return {name: np.stack([request.arrays[name] for request in requests]) for name in requests[0].arrays}
