"""The stages of a build: told as they begin, and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

LOGGER = logging.getLogger("planish")
"""Has a line for each stage at level INFO, and its duration at level DEBUG; nothing shows them unless asked to."""


class Progress(Protocol):
    """A function that `optimize`, `verify` and `bench` call as each of their stages begins, in their own thread.

    The name of the stage, how many are done and how many there are in all, which stays the same. A stage may be told
    several times, by what is done in it; one that turns out to be needless is never told. An exception that it raises
    ends the run, as Ctrl-C would, and nothing is written.
    """

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Tell the user, and return soon."""


def silent(stage: str, done: int, total: int, /) -> None:
    """Tell nobody."""


@dataclass
class Stages:
    """Tells the user what is being done, and remembers how long each stage took."""

    progress: Progress
    total: int
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, *, counts: bool = True) -> Iterator[None]:
        """One stage of the build; one that does not count is a part of that which follows: nobody knew of it before."""
        self.tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        LOGGER.debug("%s took %.2f s", name, time.perf_counter() - start)
        self.done += counts

    def tell(self, what: str) -> None:
        """Say what is being done in this stage."""
        LOGGER.info("%d of %d: %s", self.done + 1, self.total, what)
        self.progress(what, self.done, self.total)


def count_stages(*, may_measure: bool) -> int:
    """Number of stages for one engine: passes, emission, check and, where something may be timed, measurement."""
    return 4 if may_measure else 3
