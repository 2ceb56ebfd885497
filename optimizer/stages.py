"""The stages of a build: told as they begin, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stages:
    """Tells the user what is being done, and remembers how long each stage took."""

    report: Callable[[str, int, int], None]
    total: int
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage of the build."""
        self.report(name, self.done, self.total)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.done += 1
