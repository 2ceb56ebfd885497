"""Worker processes that try one seed after the other; one that dies, hangs or grows too large is replaced."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from planish.optimizer.cli.failures import exit_code_of

SECONDS = 20.0
"""A case that takes more time of processors hangs: on a busy machine the clock says little."""
WHOLE_SECONDS = 60.0
"""The same for a checkpoint, which may be built as a whole: torch traces three components of an encoder-decoder."""
_WAITING_FACTOR = 8
"""A case that waits this many times longer, by the clock, hangs as well."""
BYTES = 4 << 30
"""A case that makes its process, children included, larger than this takes the machine."""
_WATCH_SECONDS = 0.1
_BUG = 70
_TOLD_CODES = frozenset({1, 2, 3, 4, 5})


@dataclass(frozen=True)
class Ending:
    """How the case of a seed ended."""

    seed: int
    kind: str
    """A few words that cases which end alike share."""
    line: str = ""
    """What was said, for a failure."""
    failed: bool = False
    seconds: float = 0.0


@dataclass
class Report:
    """All endings of a run."""

    endings: list[Ending] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Ending]:
        """The cases that ended badly, by seed."""
        return sorted((ending for ending in self.endings if ending.failed), key=lambda ending: ending.seed)

    def __str__(self) -> str:
        """How many ended how, the slowest, and the rate."""
        counts = Counter(ending.kind for ending in self.endings)
        lines = [f"{count:7} {kind}" for kind, count in counts.most_common()]
        slowest = max(self.endings, key=lambda ending: ending.seconds, default=None)
        if slowest is not None:
            lines.append(f"slowest: seed {slowest.seed}, {slowest.seconds:.1f} s")
        rate = len(self.endings) / self.seconds if self.seconds else 0.0
        lines.append(f"{len(self.endings)} cases, {len(self.failures)} failures, {rate:.1f} cases a second")
        return "\n".join(lines)


def fuzz(kind: str, seeds: Sequence[int], workers: int = 1, say: Callable[[str], None] = lambda _: None) -> Report:
    """Try every seed; ``say`` is told each failure as one line when it happens."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        waiting.put(seed)
    report, start = Report(), time.perf_counter()

    def work() -> None:
        with Worker(kind) as worker:
            while True:
                try:
                    seed = waiting.get_nowait()
                except queue.Empty:
                    return
                ending = worker.attempt(seed)
                report.endings.append(ending)
                if ending.failed:
                    say(f"seed {ending.seed}: {ending.kind}: {ending.line}")

    threads = [threading.Thread(target=work) for _ in range(max(1, workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.seconds = time.perf_counter() - start
    return report


class Worker:
    """A process that tries seeds, watched from here; it pays for its imports once."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._seconds = WHOLE_SECONDS if kind == "checkpoints" else SECONDS
        self._start()

    def __enter__(self) -> Worker:
        """The worker, which is starting."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and what it started."""
        self._stop()

    def attempt(self, seed: int) -> Ending:
        """The ending of a seed; the process is replaced if the case killed it or had to be stopped."""
        start = time.perf_counter()
        self._tell(seed)
        reason = self._watch(start)
        seconds = time.perf_counter() - start
        line = "" if reason else self._replies.readline().decode()
        if not line:
            said = self._stop()
            self._start()
            return Ending(seed, reason or "the process died", said, failed=True, seconds=seconds)
        told = json.loads(line)
        return Ending(seed, told["kind"], told["line"], told["failed"], seconds)

    def _start(self) -> None:
        ours, theirs = os.pipe()
        self._folder = tempfile.mkdtemp(prefix="fuzz-")
        self._log = Path(self._folder, "log").open("w+b")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", self._kind, "--serve", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs,),
            env={**os.environ, "TMPDIR": self._folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(theirs)
        self._replies = os.fdopen(ours, "rb")
        if not self._replies.readline():  # imports are not counted as time of a case
            raise RuntimeError(f"the worker does not start: {self._stop()}")

    def _stop(self) -> str:
        """The last line that the process wrote; it is gone afterwards, its children as well."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.kill()
        code = self._process.wait()
        self._replies.close()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return f"exit code {code} {''.join(lines[-1:])[:300]}"

    def _tell(self, seed: int) -> None:
        stdin: IO[bytes] | None = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died between two cases: the watch sees it
                stdin.write(f"{seed}\n".encode())
                stdin.flush()

    def _watch(self, start: float) -> str:
        """Wait for an answer or the end of the process; the reason if it must be stopped."""
        _, spent = _use_of(self._process.pid)
        while not select.select([self._replies], [], [], _WATCH_SECONDS)[0]:
            memory, seconds = _use_of(self._process.pid)
            if seconds - spent > self._seconds or time.perf_counter() - start > self._seconds * _WAITING_FACTOR:
                return f"longer than {self._seconds:.0f} s"
            if memory > BYTES:
                return f"more than {BYTES >> 30} GB"
        return ""


def _use_of(pid: int) -> tuple[int, float]:
    """Bytes of memory of a process and of what it started, and the time that they have worked."""
    memory, shared, seconds = 0, 0, 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory += member.memory_info().rss
                seconds += sum(member.cpu_times()[:4])  # of children that ended as well
        if memory > BYTES:  # pages that a fork shares are counted twice so far; the exact figure takes its time
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    shared += member.memory_info().rss - member.memory_full_info().pss
    return memory - shared, seconds


def serve(kind: str, descriptor: int) -> None:
    """Be a worker: read seeds from standard input, answer each with a line of JSON."""
    warnings.simplefilter("ignore")
    case = importlib.import_module(f"tests.fuzz.{kind}").case
    with os.fdopen(descriptor, "wb") as replies:
        replies.write(b"ready\n")
        replies.flush()
        for line in sys.stdin:
            replies.write(json.dumps(outcome(case, int(line))).encode() + b"\n")
            replies.flush()


def outcome(case: Callable[[int, Path], str], seed: int) -> dict[str, object]:
    """Try one seed in this process: a few words, the line that a user would see, and whether it failed."""
    with tempfile.TemporaryDirectory(prefix="case-") as folder:
        try:
            return {"kind": case(seed, Path(folder)), "line": "", "failed": False}
        except Exception as error:
            return _judged(error)


def _judged(error: Exception) -> dict[str, object]:
    """What the command line makes of an exception: its code and its line."""
    if not hasattr(error, "exit_code") and not isinstance(error, OSError | MemoryError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.name}"
        said = " ".join(str(error).split())[:300]
        return {"kind": f"{type(error).__name__} in {where}", "line": said, "failed": True}
    with contextlib.redirect_stderr(io.StringIO()):
        code = exit_code_of(error)
    failed = code == _BUG or code not in _TOLD_CODES
    line = " ".join(str(error).split())[:300]
    return {"kind": f"exit code {code}", "line": line, "failed": failed}
