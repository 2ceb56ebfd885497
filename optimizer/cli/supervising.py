"""The process that a user's command is: it watches another one do the work.

Whatever the work is in the middle of (the import of a module, the garbage collector, a minute of C++), the watching
process only waits: it answers Ctrl-C, SIGTERM and SIGHUP at once. It asks the work to end, ends it with all its
processes if that takes most of a second or if the user asks again, removes what it left, and says so in one line.
A work that is killed, or that breaks in native code, is told of in one line as well.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from planish.optimizer.system import interrupts

INTERRUPTED = 130
"""Exit code that shells return for a command that Ctrl-C ended."""
GRACE = 0.7
"""Seconds that the work has for tidying up by itself."""
_ONE_PRESS = 0.2
"""A terminal sends Ctrl-C to all processes: within these seconds it may be the one that the work has told of."""
_PR_SET_CHILD_SUBREAPER = 36
_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"
_ENDED_BY: dict[int, tuple[int, str, str]] = {
    signal.SIGKILL: (5, "the work was killed (signal 9)", "if nobody did, memory ran out: use a larger machine"),
    signal.SIGXCPU: (5, "the work used up its processor time (signal 24)", "raise the limit (ulimit -t)"),
}


def supervise() -> None:
    """Return in a new process that does the work; this one watches it and never returns.

    Where the system is not Linux, or has no process left, the work is done here.
    """
    answered = interrupts.answered()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started us may ignore it: no child could be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, answered)
    watcher = os.getpid()
    reading, writing = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no process left
        child = 0
        watcher = 0
    if child:
        os.close(writing)
        try:
            _watch(child, reading, answered)
        except BaseException as error:  # noqa: BLE001 - going on from here would do the work twice
            _say(f"planish: error: a bug of ours: {type(error).__name__}: {error}; please report it")
            os._exit(70)
    os.close(reading)
    if watcher:
        interrupts.end_with_parent()
        if os.getppid() != watcher:
            os._exit(INTERRUPTED)  # it was killed before it could take us along
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    interrupts.answer(answered, writing if watcher else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, answered)


def _watch(child: int, reading: int, answered: tuple[signal.Signals, ...]) -> NoReturn:
    work = _Work(child, reading)
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for kind in (*answered, signal.SIGCHLD):
        signal.signal(kind, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, answered)
    # What the work has started becomes ours when it ends: nothing can get away.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    watched = select.poll()
    watched.register(waking, select.POLLIN)
    watched.register(reading, select.POLLIN)
    asked_at, deadline = math.inf, math.inf
    while not work.ended():
        left = None if deadline == math.inf else max(0.0, (deadline - time.monotonic()) * 1e3)
        ready = {descriptor for descriptor, _ in watched.poll(left)}
        signals = [number for number in _drained(waking) if number != signal.SIGCHLD]
        if reading in ready and not work.listen():
            watched.unregister(reading)
        now = time.monotonic()
        if now >= deadline or (signals and now - asked_at > _ONE_PRESS):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        if deadline == math.inf and (signals or work.asked):
            asked_at, deadline = now, now + GRACE
            os.kill(child, signals[0] if signals else signal.SIGTERM)
            work.asked = True
    os._exit(work.finish())


def _drained(descriptor: int) -> bytes:
    with suppress(BlockingIOError):
        return os.read(descriptor, 4096)
    return b""


class _Work:
    """The process that does the work, and what it has told."""

    def __init__(self, child: int, reading: int) -> None:
        os.set_blocking(reading, False)
        self.child = child
        self.asked = False
        self.code: int | None = None
        """Exit code, or minus the signal that ended it."""
        self._reading = reading
        self._said = b""

    def ended(self) -> bool:
        """Collect the processes that have ended; whether the work is among them."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return False
                if pid == self.child:
                    self.code = os.waitstatus_to_exitcode(status)
                    return True
        return True

    def listen(self) -> bool:
        """Read what it tells, lines of JSON, and the numbers of signals that it got itself; False at the end."""
        try:
            heard = os.read(self._reading, 1 << 16)
        except BlockingIOError:
            return True
        numbers = bytes(interrupts.ENDING)
        self.asked = self.asked or any(byte in numbers for byte in heard)
        self._said += heard.translate(None, delete=bytes(range(10)) + bytes(range(11, 32)))
        return bool(heard)

    def finish(self) -> int:
        """End what it started, remove what it left, say what happened; the exit code."""
        if self.code == 0 and not self.asked:
            return 0
        _end_children()
        while self.listen() and select.select([self._reading], [], [], 0)[0]:
            pass
        # Whoever is killed while it writes leaves half a line behind the last one.
        lines = [json.loads(line) for line in self._said.split(b"\n")[:-1] if line]
        if self.asked or self.code in (INTERRUPTED, *(-number for number in interrupts.ENDING)):
            _sweep(lines)
            kept = [str(line[1]) for line in lines if line[0] == "kept"]
            moves = [(str(line[1]), int(line[2]), int(line[3])) for line in lines if line[0] == "move"]
            _say(interrupts.farewell(moves, kept[-1] if kept else None))
            return INTERRUPTED
        if self.code is None or self.code >= 0:
            return self.code or 0
        _sweep(lines)
        code, what, advice = _ENDED_BY.get(
            -self.code, (70, f"a bug of ours: the work ended with signal {-self.code}", "please report it")
        )
        _say(f"planish: error: {what}; {advice}")
        return code


def _end_children() -> None:
    """End every process that the work started, and those which these started."""
    with suppress(ChildProcessError):
        ended = -1
        while ended:
            children = _children()
            for pid in children:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended, _ = os.waitpid(-1, 0 if children else os.WNOHANG)


def _children() -> list[int]:
    """Processes whose parent this one is, by what Linux tells of all of them."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name of the program, in parentheses, may hold anything; state and parent follow it.
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                children.append(int(status.parent.name))
    return children


def _sweep(lines: list[list[object]]) -> None:
    """Remove what the work left. The next run does it too, if this is interrupted or not allowed."""
    from planish.optimizer.system.scratch import PREFIX, sweep
    from planish.optimizer.system.staging import remove_empty, sweep_up

    for kind, *values in lines:
        with suppress(OSError):
            if kind == "scratch":
                sweep(Path(str(values[0])), PREFIX)
            elif kind == "output":
                sweep_up(Path(str(values[0])), is_file=bool(values[1]))
    remove_empty([Path(str(values[0])) for kind, *values in lines if kind == "made"])


def _say(line: str) -> None:
    with suppress(OSError):  # nobody may be there any more to read it
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)  # a progress bar hides it
        os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))
