"""Answers to a file or a stream of requests, a line of JSON each; an interrupted file is continued."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.requests import AnyRequest
from planish.optimizer.inference.task import Task
from planish.optimizer.output.manifest import digest_of, hash_files
from planish.optimizer.system import interrupts
from planish.optimizer.system.staging import MANIFEST

BATCH = 16
T = TypeVar("T")


def answer_file(
    task: Task,
    source: Path,
    output: Path,
    batch: int = BATCH,
    progress: Callable[[int], None] = lambda _: None,
    partial: Path | None = None,
) -> int:
    """Answer every request of ``source`` into the `.jsonl` file ``output``; returns how many were answered now.

    Answers gather in a hidden file beside it, which becomes ``output`` when all are there. An interrupted run goes on
    where it stopped: the hidden file's name (``partial``, if `partial_file` has been asked already) tells for which
    input and engine it is. ``progress`` gets the number of answers that are kept. BadInput if ``output`` exists.
    """
    if output.exists():
        raise BadInput("this file exists", where=output, advice="remove it, or choose another output")
    if not output.parent.is_dir():
        raise BadInput("there is no such folder", where=output.parent, advice="make it first")
    partial = partial or partial_file(task, source, output)
    done = kept_answers(partial)
    answered = 0
    with partial.open("a", encoding="utf-8") as file:
        for lines in answer_lines(task, task.requests(source), batch, done):
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


def answer_lines(task: Task, requests: Iterable[Any], batch: int = BATCH, skip: int = 0) -> Iterator[list[str]]:
    """Lines of the answers, a batch at a time, without those to the first ``skip`` requests.

    A line has the number of its request's line (of the row of an array), counted from 0, the request's `id` if it has
    one, and the answer. BadInput for a request with a field that the task does not look at.
    """
    checked = (_refuse_idle_fields(request, task) for request in requests)
    for group in _groups(checked, skip, batch):
        yield [
            json.dumps({**_identity(request), **answer}, ensure_ascii=False) + "\n"
            for request, answer in zip(group, task.answer(group), strict=True)
        ]


def _refuse_idle_fields(request: AnyRequest, task: Task) -> AnyRequest:
    for name in request.idle_fields(task.options):
        where = None if request.index is None else f"line {request.index + 1}"
        raise BadInput(f"an engine for {task.name} does not look at {name}", where=where, advice="leave it out")
    return request


def _identity(request: AnyRequest) -> dict[str, Any]:
    """The fields of an answer that tell whose answer it is."""
    return {"index": request.index} | ({} if request.id is None else {"id": request.id})


def partial_file(task: Task, source: Path, output: Path) -> Path:
    """The file where answers gather: named for the output, the content of input and engine, and the options.

    An output's content is what its manifest says of it.
    """
    if not source.is_file():
        raise BadInput("this is a folder" if source.is_dir() else "there is no such file", where=source)
    folder = task.folder.resolve()
    content = digest_of(folder.parent / MANIFEST) or sorted(hash_files(folder).items())
    identity = f"{digest_of(source)} {folder} {content} {task.name} {task.longest} {task.asked}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass"))
    return output.with_name(f".{output.name}.{digest.hexdigest()[:16]}.partial")


def kept_answers(partial: Path) -> int:
    """Number of whole lines in a file; a line that was cut off in its middle is removed."""
    if not partial.is_file():
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        partial.write_bytes(whole)
    return whole.count(b"\n")


def _groups(requests: Iterable[T], skip: int, size: int) -> Iterator[list[T]]:
    """Batches of ``size``, counted from the one behind the first ``skip``."""
    group: list[T] = []
    for request in itertools.islice(requests, skip, None):
        group.append(request)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
