"""Ctrl-C and SIGTERM: where they may raise, and the message of an interrupted command.

Python raises out of a signal handler at whatever line the main thread executes. In the garbage collector or the import
system, the exception is dropped; while torch traces, it aborts the process. The command line therefore does its work in
a child process (`cli/supervising.py`), which gets one signal and is killed if it does not end. This module is the
child's part. In another program, such as a notebook, it only delays signals while torch traces.
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
"""Signals that ask a process to end and leave it time to clean up."""

_PR_SET_PDEATHSIG = 1


class _State:
    """Interrupt state of this process; a class, so that handlers need no globals."""

    asked = False
    """True after a signal."""
    held = 0
    """Number of active blocks that delay signals."""
    reports: int | None = None
    """The pipe to the supervising process."""
    moves: list[tuple[str, int, int]]
    """Moves that are done or imminent: path, device and inode of the moved file."""
    kept: str | None = None
    """Message on the partial results of a command that can be resumed."""


_state = _State()
_state.moves = []


def interrupted() -> bool:
    """True if a signal asked this process to end."""
    return _state.asked


def watched() -> bool:
    """True if another process supervises this one and reports its end to the user."""
    return _state.reports is not None


def moving(source: Path, destination: Path) -> None:
    """Record that ``source`` is renamed to ``destination`` now, for the message of an interrupted command."""
    status = source.lstat()
    move = (str(destination), status.st_dev, status.st_ino)
    _state.moves.append(move)
    report("move", *move)


def begin() -> None:
    """Discard the state of an earlier command in this process."""
    _state.asked = False
    _state.kept = None
    _state.moves.clear()


def keep(text: str) -> None:
    """Set the message for an interruption from now on, such as "12 answers are in answers.jsonl"."""
    _state.kept = text
    report("kept", text)


def report(kind: str, *values: object) -> None:
    """Send a line to the supervising process, if there is one."""
    if _state.reports is not None:
        os.write(_state.reports, json.dumps([kind, *values]).encode() + b"\n")


def farewell(moves: Iterable[tuple[str, int, int]] | None = None, kept: str | None = None) -> str:
    """The message of an interrupted command, with the files that it has written."""
    moves = _state.moves if moves is None else moves
    written = dict.fromkeys(path for path, device, inode in moves if _is(path, device, inode))
    kept = kept or _state.kept or "nothing was written"
    return printable("planish: interrupted; " + (f"written: {', '.join(written)}" if written else kept))


def _is(path: str, device: int, inode: int) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (device, inode)


def answered() -> tuple[signal.Signals, ...]:
    """The signals that end this process. Those that its parent ignores (nohup, `&` in a script) stay ignored."""
    return tuple(kind for kind in ENDING if signal.getsignal(kind) is not signal.SIG_IGN)


def answer(kinds: Iterable[signal.Signals], reports: int | None = None) -> None:
    """Raise KeyboardInterrupt for the first of these signals, and ignore the later ones.

    ``reports`` is the pipe to the supervising process, which ends this one if the exception is dropped.
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
    """Raise KeyboardInterrupt if a child was asked to end: terminals and service managers signal all processes at
    once."""
    if -code in ENDING:
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """End this worker process at once on a signal, or when its parent ends.

    A stopped process would not notice that its input is closed, so Linux kills it (PR_SET_PDEATHSIG).
    """
    for kind in answered():
        signal.signal(kind, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Delay signals until the end of the block: an exception while torch traces aborts the process."""
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
    """Handle SIGTERM like Ctrl-C if it has no handler, so that unfinished output is removed."""

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
    """Block signals during a rename."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
