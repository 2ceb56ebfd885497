"""Answers to a file or a stream of questions, a line of JSON each; a file that was interrupted is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.requests import Question, refuse_idle_fields
from planish.optimizer.inference.session import AnyTask
from planish.optimizer.output.manifest import digest_of, hash_files
from planish.optimizer.system import interrupts
from planish.optimizer.system.staging import MANIFEST

BATCH = 16
T = TypeVar("T")


def answer_file(
    answerer: AnyTask,
    source: Path,
    output: Path,
    batch: int = BATCH,
    progress: Callable[[int], None] = lambda _: None,
    partial: Path | None = None,
) -> int:
    """Answer every question of ``source`` into the `.jsonl` file ``output``; returns how many were answered now.

    Answers gather in a hidden file beside it, which becomes ``output`` when all are there. An interrupted run goes on
    where it stopped: the hidden file's name (``partial``, if `partial_file` has been asked already) tells for which
    input and engine it is. ``progress`` gets the number of answers that are kept. BadInput if ``output`` exists.
    """
    if output.exists():
        raise BadInput("this file exists", where=output, advice="remove it, or choose another output")
    if not output.parent.is_dir():
        raise BadInput("there is no such folder", where=output.parent, advice="make it first")
    partial = partial or partial_file(answerer, source, output)
    done = kept_answers(partial)
    answered = 0
    with partial.open("a", encoding="utf-8") as file:
        for lines in answer_lines(answerer, answerer.questions(source), batch, done):
            file.writelines(lines)
            file.flush()
            answered += len(lines)
            progress(done + answered)
    if not done + answered:
        partial.unlink()
        raise BadInput("this file holds no text", where=source)
    with interrupts.uninterrupted():
        interrupts.moving(partial, output)
        partial.replace(output)
    return answered


def answer_lines(answerer: AnyTask, questions: Iterable[Any], batch: int = BATCH, skip: int = 0) -> Iterator[list[str]]:
    """Lines of the answers, a batch at a time, without those to the first ``skip`` questions.

    A line has the number of its question's line (of the row of an array), counted from 0, the question's `id` if it has
    one, and the answer.
    """
    fitting = (refuse_idle_fields(q, answerer.task) if isinstance(q, Question) else q for q in questions)
    for number, group in enumerate(_groups(fitting, skip, batch)):
        first = skip + number * batch
        yield [
            json.dumps({**_named(question, first + place), **answer}, ensure_ascii=False) + "\n"
            for place, (question, answer) in enumerate(zip(group, answerer.answer(group), strict=True))
        ]


def _named(question: Any, place: int) -> dict[str, Any]:
    """What tells whose answer it is; ``place`` is the question's among all, blank lines left out."""
    index, name = getattr(question, "index", None), getattr(question, "id", None)
    return {"index": place if index is None else index} | ({} if name is None else {"id": name})


def partial_file(answerer: AnyTask, source: Path, output: Path) -> Path:
    """Where answers gather: named for the output, the content of the input and of the engine, and what is asked.

    An output's content is what its manifest says of it.
    """
    if not source.is_file():
        raise BadInput("this is a folder" if source.is_dir() else "there is no such file", where=source)
    folder = answerer.folder.resolve()
    asked = [getattr(answerer, name, None) for name in ("most", "sampling", "raw", "prompt")]
    content = digest_of(folder.parent / MANIFEST) or sorted(hash_files(folder).items())
    named = f"{digest_of(source)} {folder} {content} {answerer.task} {answerer.longest} {asked}"
    digest = hashlib.sha256(named.encode("utf-8", "surrogatepass"))
    return output.with_name(f".{output.name}.{digest.hexdigest()[:16]}.partial")


def kept_answers(partial: Path) -> int:
    """Number of whole lines in a file; what was cut off in the middle of a line is removed."""
    if not partial.is_file():
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        partial.write_bytes(whole)
    return whole.count(b"\n")


def _groups(questions: Iterable[T], skip: int, size: int) -> Iterator[list[T]]:
    """So many at once, counted from those behind the first ``skip``."""
    group: list[T] = []
    for index, question in enumerate(questions):
        if index >= skip:
            group.append(question)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
