"""Ctrl-C and SIGTERM: where they may raise, and what is told of a command that they ended.

Python raises out of a signal handler wherever the main thread happens to be. While the garbage collector or the import
system runs, that exception is swallowed; while torch traces, it ends the process. So the command line does not rely on
it: its work is done in a child process (`cli/supervising.py`) that is asked once, politely, and killed if it does not
end. This module is the child's side. In a process of somebody else's, a notebook, it only lets signals wait while torch
traces.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from planish.optimizer.errors import printable

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end, and leave it the time to tidy up."""

_PR_SET_PDEATHSIG = 1


class _State:
    """State of the interruption of this process; a class, so that handlers need no globals."""

    asked = False
    """A signal came."""
    held = 0
    """So many blocks want signals to wait."""
    reports: int | None = None
    """The pipe to the process that watches this one."""
    moves: list[tuple[str, int, int]]
    """Moves that are done or about to be: a path, and device and inode of the file that gets it."""
    kept: str | None = None
    """The results so far of a command that can be resumed, as text."""


_state = _State()
_state.moves = []


def interrupted() -> bool:
    """True if a signal asked this process to end."""
    return _state.asked


def watched() -> bool:
    """True if another process watches this one, and tells the user how it ended."""
    return _state.reports is not None


def moving(source: Path, destination: Path) -> None:
    """Remember that ``source`` gets the name ``destination`` now: tells later what a command that ended had written."""
    found = source.lstat()
    move = (str(destination), found.st_dev, found.st_ino)
    _state.moves.append(move)
    report("move", *move)


def begin() -> None:
    """Forget what an earlier command in this process did."""
    _state.asked = False
    _state.kept = None
    _state.moves.clear()


def keep(text: str) -> None:
    """Say what is kept if the command is interrupted from now on, such as "12 answers are in answers.jsonl"."""
    _state.kept = text
    report("kept", text)


def report(kind: str, *values: object) -> None:
    """Tell the process that watches this one, if there is one."""
    if _state.reports is not None:
        os.write(_state.reports, json.dumps([kind, *values]).encode() + b"\n")


def farewell(moves: Iterable[tuple[str, int, int]] | None = None, kept: str | None = None) -> str:
    """The line for a command that was interrupted: what it had written by then."""
    moves = _state.moves if moves is None else moves
    written = dict.fromkeys(path for path, device, inode in moves if _is(path, device, inode))
    kept = kept or _state.kept or "nothing was written"
    return printable("planish: interrupted; " + (f"written: {', '.join(written)}" if written else kept))


def _is(path: str, device: int, inode: int) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (device, inode)


def answered() -> tuple[signal.Signals, ...]:
    """The signals that end this process; what its parent ignores (nohup, `&` in a script) stays ignored."""
    return tuple(kind for kind in ENDING if signal.getsignal(kind) is not signal.SIG_IGN)


def answer(kinds: Iterable[signal.Signals], reports: int | None = None) -> None:
    """Raise KeyboardInterrupt for the first of these signals, and do nothing for those that follow.

    ``reports`` is the pipe to the process that watches this one, which ends it if that exception is swallowed.
    """
    _state.reports = reports
    begin()
    complain, tell = sys.unraisablehook, sys.excepthook

    def unraisable(lost: Any) -> None:
        if not (_state.asked and isinstance(lost.exc_value, KeyboardInterrupt)):
            complain(lost)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (_state.asked and isinstance(error, KeyboardInterrupt)):
            tell(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught
    for kind in kinds:
        signal.signal(kind, _raise_once)


def _raise_once(*_: object) -> None:
    if not _state.asked:
        _state.asked = True
        if not _state.held:
            raise KeyboardInterrupt


def check_ended(code: int) -> None:
    """KeyboardInterrupt if one of our processes was asked to end: a terminal or a service asks all of them at once."""
    if -code in ENDING:
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """Let this process, which works for another, end at once when it is asked to or when that one has ended.

    A stopped process would not notice that its input has ended: Linux ends it.
    """
    for kind in answered():
        signal.signal(kind, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Hold signals until the block ends: torch ends the process if an exception comes while it traces."""
    caught: list[int] = []
    replaced: dict[signal.Signals, Any] = {}
    try:
        for kind in answered():
            # Ours waits by itself. SIGTERM without a handler ends the process at once, which is as good.
            if signal.getsignal(kind) not in (_raise_once, signal.SIG_DFL, None):
                replaced[kind] = signal.signal(kind, lambda number, _: caught.append(number))
    except ValueError:  # not in the main thread: whoever runs us there takes care of signals
        replaced = {}
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        for kind, handler in replaced.items():
            signal.signal(kind, handler)
    if _state.asked and not _state.held:
        raise KeyboardInterrupt
    for number in caught[:1]:
        signal.raise_signal(number)


@contextmanager
def terminating() -> Iterator[None]:
    """Unwind on SIGTERM as on Ctrl-C where nobody handles it, so that nothing half-written stays."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    changed = False
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, interrupt)
            changed = True
    except ValueError:  # not in the main thread
        changed = False
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back for the moment in which something gets its name."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
