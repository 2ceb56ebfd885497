"""Engines in processes of their own: run there, and timed there in alternation.

Each engine lives in a worker process, so that thread pools do not mix, a runtime that dies takes nobody along, and its
memory is gone with it. While one worker is timed the others are stopped (SIGSTOP where the system has it): threads
that spin after their work would be measured with the next engine otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from planish.optimizer import errors, interrupts, registry
from planish.optimizer.backend import Arrays
from planish.optimizer.continuation import follow
from planish.optimizer.errors import InternalError, PlanishError
from planish.optimizer.generate import Decoding
from planish.optimizer.reference import Continuation, thin
from planish.optimizer.scratch import scratch_file

CONFIDENCE = 0.95
_CALLS = 6
"""Timed calls of a turn; the first of them warms the caches again and is not counted."""
_TURN_SECONDS = 0.4
"""A turn is cut short after this long."""
_FEWEST_ROUNDS = 20
_MOST_ROUNDS = 60
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Equal engines that were opened one after the other differed by up to 8 %, with huge pages by up to 2 %: in small ones
it is luck whether the weights of a process lie well."""
_SEED = 0


@dataclass(frozen=True)
class EngineRef:
    """An engine that can be opened anywhere: its target as text, and its path."""

    target: str
    path: Path
    components: tuple[str, ...] = ()
    """The path is an engine folder whose components generate together; otherwise it is one model."""


@dataclass(frozen=True)
class Timing:
    """Latency of one engine in milliseconds, and its speed as a ratio to the first engine of the same run."""

    median_ms: float
    speedup: float
    low: float
    """Lower end of the confidence interval of the speed-up."""
    high: float
    rounds: int

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies above one."""
        return self.low > 1.0


class Worker:
    """A process that holds one opened engine."""

    def __init__(self, engine: EngineRef, environment: Mapping[str, str] | None = None) -> None:
        self.engine = engine
        ours, theirs = os.pipe()
        self._said = scratch_file()
        where = [engine.target, str(engine.path), str(theirs), *engine.components]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "planish.optimizer.measure", *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # what runtimes print there is not for our users
            stderr=self._said,
            pass_fds=(theirs,),
            env={**(environment or {}), **os.environ},
        )
        os.close(theirs)
        self._replies = os.fdopen(ours, "rb")
        self._ask = _pipe(self._process.stdin)

    def __enter__(self) -> Self:
        """Wait until the engine is open; raises what opening it raised."""
        self._reply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.resume()
        self._process.kill()
        self._process.wait()
        for stream in (self._ask, self._replies, self._said):
            with suppress(BrokenPipeError):
                stream.close()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs of the engine, by name, thinned as those of the reference are."""
        from safetensors.numpy import load

        self._send("run", inputs)
        outputs: dict[str, np.ndarray] = load(self._reply())
        return outputs

    def follow(self, wanted: Continuation) -> np.ndarray:
        """Scores of the engine along a continuation of the original, shape (steps, batch, vocabulary)."""
        from safetensors.numpy import load

        arrays = {f"prompt:{name}": array for name, array in wanted.prompt.items()}
        self._send("follow", {**arrays, "start": wanted.start, "tokens": wanted.tokens}, swap=wanted.swap)
        scores: np.ndarray = load(self._reply())["scores"]
        return scores

    def time(self, calls: int, seconds: float) -> list[float]:
        """Milliseconds of up to ``calls`` calls with the inputs of the last `run`, at least two."""
        self._send("time", {}, calls=calls, seconds=seconds)
        return [float(value) for value in json.loads(self._reply())]

    def memory(self) -> int:
        """Peak resident memory of the process so far, in bytes."""
        self._send("memory", {})
        return int(json.loads(self._reply()))

    def pause(self) -> None:
        """Stop the process where the system can."""
        if hasattr(signal, "SIGSTOP"):
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if hasattr(signal, "SIGCONT") and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def _send(self, command: str, arrays: Arrays, **options: float) -> None:
        from safetensors.numpy import save

        body = save({name: np.asarray(array, order="C") for name, array in arrays.items()}) if arrays else b""
        header = json.dumps({"command": command, "bytes": len(body), **options}).encode()
        try:
            self._ask.write(header + b"\n" + body)
            self._ask.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _reply(self) -> bytes:
        line = self._replies.readline()
        if not line:
            raise self._died()
        header = json.loads(line)
        if "error" in header:
            kind: type[PlanishError] = getattr(errors, header["error"], InternalError)
            raise kind(header["what"], where=header["where"], advice=header["advice"])
        return self._replies.read(header["bytes"])

    def _died(self) -> PlanishError:
        code = self._process.wait()
        interrupts.check_ended(code)
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        kind = errors.OutOfResources if code == -signal.SIGKILL else InternalError
        return kind(f"the process of this engine ended ({how}): {last[0][:300]}", where=self.engine.path)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise InternalError("a worker process has no standard input")
    return stream


@contextmanager
def opened(engines: Sequence[EngineRef]) -> Iterator[list[Worker]]:
    """A worker for each engine, all open inside, their memory in huge pages where the system has them."""
    with ExitStack() as stack:
        yield [stack.enter_context(Worker(engine, _HUGE_PAGES)) for engine in engines]


def race(engines: Sequence[EngineRef], inputs: Sequence[Arrays], *, seconds: float = 30.0) -> list[Timing]:
    """Time engines in alternation, each on its own inputs; the first is what the others are compared with.

    Ends when every interval excludes one, after the greatest number of rounds, or when ``seconds`` are used up and
    five rounds are done.
    """
    turns = alternate(engines, inputs, seconds=seconds, enough=_clear)
    return [timing(turns[0], own) for own in turns]


def alternate(
    engines: Sequence[EngineRef],
    inputs: Sequence[Arrays],
    *,
    seconds: float = 30.0,
    enough: Callable[[Sequence[Sequence[float]]], bool] = lambda _: False,
) -> list[list[float]]:
    """Milliseconds of each turn of each engine; turn i of one belongs to turn i of every other.

    Every round gives each engine a turn of a few calls, in an order that changes, and a turn counts with the median of
    its calls: ratios within a round are free of the drift of the machine.
    """
    turns: list[list[float]] = [[] for _ in engines]
    with opened(engines) as workers:
        for worker, feeds in zip(workers, inputs, strict=True):
            worker.run(feeds)
            worker.time(_CALLS, _TURN_SECONDS)
            worker.pause()
        start = time.perf_counter()
        for number in range(_MOST_ROUNDS):
            for index in _order(len(workers), number):
                turns[index].append(_turn(workers[index]))
            late = number >= 4 and time.perf_counter() - start > seconds
            if late or (number % _FEWEST_ROUNDS == _FEWEST_ROUNDS - 1 and enough(turns)):
                break
    return turns


def _clear(turns: Sequence[Sequence[float]]) -> bool:
    """Whether every engine is known to be faster or slower than the first."""
    timings = [timing(turns[0], own) for own in turns[1:]]
    return all(found.low > 1 or found.high < 1 for found in timings)


def _order(count: int, number: int) -> list[int]:
    """Engine numbers, rotated by the round and turned round every other time."""
    order = [(index + number) % count for index in range(count)]
    return order[::-1] if number % 2 else order


def _turn(worker: Worker) -> float:
    worker.resume()
    try:
        return statistics.median(worker.time(_CALLS, _TURN_SECONDS)[1:])
    finally:
        worker.pause()


def timing(base: Sequence[float], own: Sequence[float]) -> Timing:
    """An engine's turns compared with those of another, round by round."""
    ratios = np.asarray(base) / np.asarray(own)
    low, high = interval(ratios)
    return Timing(statistics.median(own), float(np.median(ratios)), low, high, len(own))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap confidence interval of the median (percentile method; Efron and Tibshirani 1993, chapter 13)."""
    from scipy.stats import bootstrap

    if len(values) < 2 or np.ptp(values) == 0:
        return float(values[0]), float(values[-1])
    found = bootstrap(
        (values,), np.median, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return float(found.low), float(found.high)


def main() -> None:
    """What a worker process does: open its engine, then answer commands until its input ends."""
    target, path, descriptor, *components = sys.argv[1:]
    interrupts.end_with_parent()
    with os.fdopen(int(descriptor), "wb") as replies:
        try:
            backend, place = registry.backend(target), Path(path)
            engine: Any = backend.open(place) if not components else Decoding.of(backend, place, components)
            _answer(replies, b"")
            _serve(engine, sys.stdin.buffer, replies)
        except PlanishError as error:
            _complain(replies, error)


def _serve(engine: Any, commands: IO[bytes], replies: IO[bytes]) -> None:
    from safetensors.numpy import load, save

    inputs: Arrays = {}
    while line := commands.readline():
        header = json.loads(line)
        body = commands.read(header["bytes"])
        try:
            if header["command"] == "run":
                inputs = load(body)
                found = {name: np.asarray(array, order="C") for name, array in thin(engine.run(inputs)).items()}
                _answer(replies, save(found))
            elif header["command"] == "follow":
                _answer(replies, save({"scores": follow(engine, _continuation(load(body), int(header["swap"])))}))
            elif header["command"] == "time":
                _answer(replies, json.dumps(_time(engine, inputs, header)).encode())
            else:
                _answer(replies, json.dumps(_peak_memory()).encode())
        except PlanishError as error:
            _complain(replies, error)


def _continuation(arrays: Arrays, swap: int) -> Continuation:
    prompt = {name.partition(":")[2]: array for name, array in arrays.items() if name.startswith("prompt:")}
    return Continuation(prompt, swap, arrays["start"], arrays["tokens"], np.zeros(0))


def _time(engine: Any, inputs: Arrays, header: Mapping[str, float]) -> list[float]:
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < header["calls"] and sum(spent) < header["seconds"] * 1e3):
        call = engine.prepare(inputs)  # a cache inside the engine must be set again for each call
        start = time.perf_counter()
        call()
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def _peak_memory() -> int:
    from planish.optimizer.instruments import peak_memory

    return peak_memory()


def _answer(replies: IO[bytes], body: bytes) -> None:
    replies.write(json.dumps({"bytes": len(body)}).encode() + b"\n" + body)
    replies.flush()


def _complain(replies: IO[bytes], error: PlanishError) -> None:
    header = {"error": type(error).__name__, "what": error.what, "where": error.where, "advice": error.advice}
    replies.write(json.dumps(header).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
