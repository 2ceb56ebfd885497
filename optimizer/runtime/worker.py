"""Engines in processes of their own: run there, and timed there in alternation.

Each engine lives in a worker process, so that thread pools do not mix, a runtime that dies takes nobody along, and its
memory is gone with it. While one worker is timed the others are stopped (SIGSTOP where the system has it): threads
that spin after their work would be measured with the next engine otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from planish.optimizer import errors
from planish.optimizer.errors import InternalError, PlanishError
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.cases import thin
from planish.optimizer.runtime.generation import Decoding
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation, score_teacher_forced
from planish.optimizer.system import interrupts
from planish.optimizer.system.scratch import scratch_file

_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Equal engines that were opened one after the other differed by up to 8 %, with huge pages by up to 2 %: in small ones
it is luck whether the weights of a process lie well."""


@dataclass(frozen=True)
class EngineRef:
    """An engine that can be opened anywhere: its target as text, and its path."""

    target: str
    path: Path
    components: tuple[str, ...] = ()
    """The path is an engine folder whose components generate together; otherwise it is one model."""


class Worker:
    """A process that holds one opened engine."""

    def __init__(self, engine: EngineRef, environment: Mapping[str, str] | None = None) -> None:
        self.engine = engine
        ours, theirs = os.pipe()
        self._said = scratch_file()
        where = [engine.target, str(engine.path), str(theirs), *engine.components]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "planish.optimizer.runtime.worker", *where],
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

    def score_teacher_forced(self, wanted: GreedyContinuation) -> np.ndarray:
        """Scores of the engine along a continuation of the original, shape (steps, batch, vocabulary)."""
        from safetensors.numpy import load

        arrays = {f"prompt:{name}": array for name, array in wanted.prompt.items()}
        self._send("follow", {**arrays, "start": wanted.start, "tokens": wanted.tokens}, reorder_at=wanted.reorder_at)
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
                _answer(
                    replies,
                    save(
                        {"scores": score_teacher_forced(engine, _continuation(load(body), int(header["reorder_at"])))}
                    ),
                )
            elif header["command"] == "time":
                _answer(replies, json.dumps(_time(engine, inputs, header)).encode())
            else:
                _answer(replies, json.dumps(_peak_memory()).encode())
        except PlanishError as error:
            _complain(replies, error)


def _continuation(arrays: Arrays, reorder_at: int) -> GreedyContinuation:
    prompt = {name.partition(":")[2]: array for name, array in arrays.items() if name.startswith("prompt:")}
    return GreedyContinuation(prompt, reorder_at, arrays["start"], arrays["tokens"], np.zeros(0))


def _time(engine: Any, inputs: Arrays, header: Mapping[str, float]) -> list[float]:
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < header["calls"] and sum(spent) < header["seconds"] * 1e3):
        call = engine.prepare(inputs)  # a cache inside the engine must be set again for each call
        start = time.perf_counter()
        call()
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def _peak_memory() -> int:
    from planish.optimizer.system.machine import peak_memory

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
