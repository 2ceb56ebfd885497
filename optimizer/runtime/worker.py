"""Engines in processes of their own: run there, and timed there in alternation.

Each engine lives in a worker process, so that thread pools do not mix, a runtime that dies takes nobody along, and its
memory is gone with it. While one worker is timed the others are stopped (SIGSTOP where the system has it): threads
that spin after their work would be measured with the next engine otherwise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.counters import OperatorTime
from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.cases import thin
from planish.optimizer.runtime.generation import Decoding
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation, score_teacher_forced
from planish.optimizer.system.child_process import ChildProcess, Message, serve
from planish.optimizer.system.machine import peak_memory

_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Equal engines that were opened one after the other differed by up to 8 %, with huge pages by up to 2 %: in small ones
it is luck whether the weights of a process lie well."""


_PATIENCE = 180.0
"""Seconds that any request may take, beside those for the weights."""
_CALLS_IN_ONE = 4
"""As many times the limit has a request that opens an engine and runs it often."""
_SLOWEST = 4e6
"""Bytes of weights a second: a machine that is busy with other things, or reads them from a slow disk each time, is
faster by far."""


@dataclass(frozen=True)
class EngineRef:
    """An engine that can be opened anywhere: its target as text, and its path."""

    target: str
    path: Path
    components: tuple[str, ...] = ()
    """The path is an engine folder whose components generate together; otherwise it is one model."""

    @property
    def patience(self) -> float:
        """Seconds after which an engine that does not answer never will."""
        folder = self.path.parent if self.path.is_file() else self.path  # weights may lie beside it, under any name
        return _PATIENCE + sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) / _SLOWEST


class Worker:
    """A process that holds one opened engine."""

    def __init__(self, engine: EngineRef, environment: Mapping[str, str] | None = None) -> None:
        """Start the process; ``environment`` holds variables that it has unless this process has others."""
        self.engine = engine
        self._patience = engine.patience
        self.child = ChildProcess.start(
            "planish.optimizer.runtime.worker",
            "the process of this engine",
            where=engine.path,
            environment={**(environment or {}), **os.environ},
        )

    def __enter__(self) -> Self:
        """Wait until the engine is open; raises what opening it raised."""
        try:
            self.open()
        except BaseException:
            self.child.close()
            raise
        return self

    def open(self) -> None:
        """Open the engine in the process; raises what opening it raised."""
        engine = self.engine
        self._ask("open", target=engine.target, path=str(engine.path), components=engine.components)

    def _ask(self, name: str, arrays: Arrays | None = None, **values: Any) -> Message:
        return self.child.request_within(self._patience, name, arrays, **values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.child.close()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs of the engine, by name, thinned as those of the reference are."""
        return dict(self._ask("run", inputs).arrays)

    def score_teacher_forced(self, wanted: GreedyContinuation) -> np.ndarray:
        """Scores of the engine along a continuation of the original, shape (steps, batch, vocabulary)."""
        prompt = {f"prompt:{name}": array for name, array in wanted.prompt.items()}
        arrays = {**prompt, "start": wanted.start, "tokens": wanted.tokens}
        return self._ask("score", arrays, reorder_at=wanted.reorder_at).arrays["scores"]

    def time(self, calls: int, seconds: float) -> list[float]:
        """Milliseconds of up to ``calls`` calls with the inputs of the last `run`, at least two."""
        reply = self._ask("time", calls=calls, seconds=seconds)
        return [float(value) for value in reply.values["milliseconds"]]

    def operator_times(self, inputs: Arrays, calls: int) -> list[OperatorTime]:
        """The operators of the engine, which is opened with its runtime's counters for this and need not be open."""
        values = {"target": self.engine.target, "path": str(self.engine.path), "calls": calls}
        reply = self.child.request_within(_CALLS_IN_ONE * self._patience, "operators", inputs, **values)
        return [OperatorTime(**values) for values in reply.values["operators"]]

    def memory(self) -> int:
        """Peak resident memory of the process so far, in bytes."""
        return int(self._ask("memory").values["bytes"])

    def pause(self) -> None:
        """Stop the process where the system can."""
        self.child.pause()

    def resume(self) -> None:
        """Continue a stopped process."""
        self.child.resume()


def operator_times(engine: EngineRef, inputs: Arrays, calls: int) -> list[OperatorTime]:
    """The operators of an engine, counted in a process of its own."""
    worker = Worker(engine, _HUGE_PAGES)
    with closing(worker.child):
        return worker.operator_times(inputs, calls)


@contextmanager
def opened(engines: Sequence[EngineRef]) -> Iterator[list[Worker]]:
    """A worker for each engine, all open inside, their memory in huge pages where the system has them."""
    with ExitStack() as stack:
        workers = [Worker(engine, _HUGE_PAGES) for engine in engines]  # all start at the same time
        for worker in workers:
            stack.callback(worker.child.close)
        for worker in workers:
            worker.open()
        yield workers


class _EngineServer:
    """Answers the requests of a `Worker` in its process."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._inputs: Arrays = {}

    def answer(self, request: Message) -> Message:
        """The reply to one request."""
        values, arrays = request.values, request.arrays
        if request.name == "open":
            backend, path = registry.backend(values["target"]), Path(values["path"])
            components = values["components"]
            self._engine = Decoding.of(backend, path, components) if components else backend.open(path)
            return Message("opened")
        if request.name == "operators":
            backend = registry.backend(values["target"])
            times = backend.operator_times(Path(values["path"]), arrays, values["calls"])
            return Message("operators", {"operators": [asdict(each) for each in times]})
        if request.name == "run":
            self._inputs = arrays
            return Message("outputs", arrays=thin(arrays, self._engine.run(arrays)))
        if request.name == "score":
            scores = score_teacher_forced(self._engine, _continuation(arrays, values["reorder_at"]))
            return Message("scores", arrays={"scores": scores})
        if request.name == "time":
            return Message("times", {"milliseconds": _time(self._engine, self._inputs, **values)})
        return Message("memory", {"bytes": peak_memory()})


def _continuation(arrays: Arrays, reorder_at: int) -> GreedyContinuation:
    prompt = {name.partition(":")[2]: array for name, array in arrays.items() if name.startswith("prompt:")}
    return GreedyContinuation(prompt, reorder_at, arrays["start"], arrays["tokens"], np.zeros(0))


def _time(engine: Any, inputs: Arrays, calls: int, seconds: float) -> list[float]:
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < calls and sum(spent) < seconds * 1e3):
        call = engine.prepare(inputs)  # a cache inside the engine must be set again for each call
        start = time.perf_counter()
        call()
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def main() -> None:
    """Hold an engine in this process, and answer requests for it."""
    serve(_EngineServer().answer)
