"""Several calls of one model, side by side, so that each weight is read once for all of them.

Every call runs in a thread of its own, one at a time. One that asks for a weight which is not in memory waits, and the
next goes on; when all wait, the weight that the first of them asked for is read, and those who asked for it go on.
Calls of equal models ask in the same order, so they go through the layers together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


class Turnstile:
    """Lets one thread run at a time, and tells it whether it may bring in what it waits for."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._ready: list[int] = []
        """Calls that can run, in order; the first of them does."""
        self._waiting: dict[int, Hashable] = {}
        """The weight that each of the other calls waits for."""
        self._own = threading.local()

    def together(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of all calls; raises what the first of them that failed raised."""
        results: dict[int, Result] = {}
        failures: dict[int, BaseException] = {}

        def run(index: int) -> None:
            self._own.index = index
            try:
                self._until_first(index)
                results[index] = calls[index]()
            except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                failures[index] = error
            finally:
                self._leave(index)

        self._ready = list(range(len(calls)))
        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in self._ready.copy()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in sorted(failures):
            raise failures[index]
        return [results[index] for index in range(len(calls))]

    def wait_for(self, what: Hashable) -> None:
        """Run the other calls until ``what`` is next; returns at once for a call that is alone."""
        index: Any = getattr(self._own, "index", None)
        if index is None:
            return
        with self._turn:
            self._ready.remove(index)
            self._waiting[index] = what
            self._choose()
        self._until_first(index)

    def _until_first(self, index: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._ready[:1] == [index])

    def _leave(self, index: int) -> None:
        with self._turn:
            self._ready.remove(index)
            self._choose()

    def _choose(self) -> None:
        """When all wait, those who wait for the same as the first go on."""
        if not self._ready and self._waiting:
            what = self._waiting[min(self._waiting)]
            self._ready = sorted(index for index, wanted in self._waiting.items() if wanted == what)
            for index in self._ready:
                del self._waiting[index]
        self._turn.notify_all()
