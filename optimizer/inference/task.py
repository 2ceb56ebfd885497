"""The protocol of everything that `planish run` can ask: requests in, one answer each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

from planish.optimizer.inference.answer_options import AnswerOptions, TaskOption
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Signature
from planish.optimizer.output.manifest import Manifest

Answer: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class OpenedFolder:
    """The content of an engine folder, of which a task is made."""

    folder: Path
    target: str
    task: str
    signatures: Sequence[Signature]
    """Of the components, the one that takes requests first."""
    config: Mapping[str, Any]
    tokenizer: Any | None
    manifest: Manifest | None = None
    """None for an engine folder that is not in an output."""
    opened: Engine | None = None
    """The engine of a program of one component, if somebody has opened it already."""

    def engine(self) -> Engine:
        """The engine of a program of one component."""
        return self.opened or registry.backend(self.target).open(self.folder)


@dataclass(kw_only=True)
class Task(ABC):
    """An opened engine that answers requests.

    A new kind of task derives from this class and has a line in `session.TASKS`.
    """

    name: str
    """The task by its name in optimum's taxonomy: `text-classification`."""
    folder: Path
    longest: int | None = None
    """Most tokens of a text; None if there is no limit."""
    asked: AnswerOptions = field(default_factory=AnswerOptions)
    """The options that the user asked for: only such as ``options`` has."""

    @classmethod
    @abstractmethod
    def open(cls, folder: OpenedFolder) -> Self:
        """The task that an engine folder serves."""

    @property
    def options(self) -> frozenset[TaskOption]:
        """The options that have an effect on its answers; others are refused."""
        return frozenset()

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of the arrays that it takes instead of texts; empty if it takes texts."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on its answers, for the user to read before them."""
        return ()

    @abstractmethod
    def requests(self, path: Path) -> Iterator[Any]:
        """Read the requests of a file one by one. BadInput if the file is of another kind."""

    @abstractmethod
    def answer(self, requests: Sequence[Any]) -> list[Answer]:
        """One answer for each request, in order; as many requests as the engine takes at once run as one batch."""

    def stream(self, text: str) -> Iterator[str] | None:
        """The parts of an answer while it is generated; None if it comes at once, from `answer`."""
        return None
