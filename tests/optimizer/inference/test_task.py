"""The protocol of tasks: a new one needs a class and a line in a table, and `run` knows by it what to refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import click
import pytest

from planish.optimizer.cli.run_command import command
from planish.optimizer.cli.run_options import refuse_idle
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.answer_files import answer_file
from planish.optimizer.inference.answer_options import AnswerOptions, TaskOption
from planish.optimizer.inference.requests import TextRequest, read_texts
from planish.optimizer.inference.session import GENERATION, TASKS, InputKind, with_options
from planish.optimizer.inference.task import Answer, OpenedFolder, Task
from planish.optimizer.inference.text_tasks import TEXT_FUNCTIONS
from planish.optimizer.inference.vision import IMAGE_FUNCTIONS
from planish.optimizer.lowering.components.tasks import TASKS as LOWERED
from planish.optimizer.lowering.components.tasks import Family
from planish.optimizer.runtime.generation import Sampling


@dataclass(kw_only=True)
class Counting(Task):
    """A task as a newcomer would write it: only what has no default."""

    @classmethod
    def open(cls, folder: OpenedFolder) -> Self:
        return cls(name=folder.task, folder=folder.folder)

    @property
    def options(self) -> frozenset[TaskOption]:
        return frozenset({TaskOption.LOGITS})

    def requests(self, path: Path) -> Iterator[TextRequest]:
        return read_texts(path)

    def answer(self, requests: Sequence[TextRequest]) -> list[Answer]:
        unit = -1 if self.asked.logits else 1
        return [{"words": unit * len(request.text.split())} for request in requests]


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting.open(OpenedFolder(tmp_path / "engine", "onnxruntime", "counting", [], {}, None))


def asked(*arguments: str) -> click.Context:
    return command.make_context("run", ["engine", *arguments])


def test_a_new_task_answers_files(counting: Counting, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "in.jsonl").write_text('{"text": "a b c", "id": "x"}\n\n{"text": "d", "pair": "e"}\n')
    assert answer_file(counting, tmp_path / "in.jsonl", tmp_path / "out.jsonl", batch=1) == 2
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [{"index": 0, "id": "x", "words": 3}, {"index": 2, "words": 1}]
    (tmp_path / "choices.jsonl").write_text('{"text": "a", "choices": ["b"]}\n')
    with pytest.raises(BadInput, match="line 1: an engine for counting does not look at choices"):
        answer_file(counting, tmp_path / "choices.jsonl", tmp_path / "no.jsonl")


def test_a_new_task_takes_the_options_that_it_names_and_no_others(counting: Counting) -> None:
    assert with_options(counting, AnswerOptions(logits=True)).answer([TextRequest("a b")]) == [{"words": -2}]
    for options, says in (
        (AnswerOptions(prompt="query"), "only texts that are embedded have prompts"),
        (AnswerOptions(max_new_tokens=3), "does not go on with a text"),
        (AnswerOptions(sampling=Sampling(1.0)), "does not go on with a text"),
    ):
        with pytest.raises(UsageError, match=says):
            with_options(counting, options)
    refuse_idle(asked("--text", "a", "--pair", "b", "--logits"), counting)
    for arguments, says in (
        (["--choice", "b"], "does not choose among answers"),
        (["--max-new-tokens", "3"], "does not go on with a text"),
    ):
        with pytest.raises(UsageError, match=says):
            refuse_idle(asked("--text", "a", *arguments), counting)
    assert (counting.stream("a"), counting.notes, counting.array_names) == (None, (), ())


def test_every_lowered_task_has_a_class() -> None:
    """Tasks without a cache by their names, those with one together."""
    encoders = {name for name, spec in LOWERED.items() if spec.family is Family.ENCODER}
    assert {name for kind, name in TASKS if name != GENERATION} == encoders
    assert {kind for kind, name in TASKS if name == GENERATION} == set(InputKind)


def test_functions_read_the_outputs_that_are_lowered() -> None:
    for name, function in TEXT_FUNCTIONS.items():
        assert tuple(function.outputs) == LOWERED[name].outputs
    assert set(IMAGE_FUNCTIONS) <= set(LOWERED)
