"""Output that appears complete or not at all, also when the process is killed.

A folder is built under a hidden name beside its destination and moved there in one step; where something stands
already, the two are exchanged in one step (renameat2 on Linux). What a killed run left behind is removed by the next
run: a lock on it tells whether its maker is alive.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from planish.optimizer.errors import BadInput, OutOfResources, is_no_room

MANIFEST = "planish.json"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_LOCK = ".building"


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A folder to build in; it becomes ``destination`` when the block ends well, and disappears when it does not.

    ``destination`` may be missing, an empty folder, or an earlier output of Planish, which is replaced. BadInput if
    something else stands there or the place cannot be written; OutOfResources if the disk is full.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - resolve() would follow a link we must replace
    _check_replaceable(destination)
    with _clear_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep(destination)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    lock = FileLock(staging / _LOCK)
    try:
        with _clear_errors(destination), _terminating(), lock:
            yield staging
            (staging / _LOCK).unlink(missing_ok=True)
            _settle(staging)
            _move(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(destination: Path) -> Iterator[Path]:
    """A path to write a file and its `.data` companion at; both move to ``destination`` when the block ends well."""
    with _clear_errors(destination):
        if destination.is_dir():
            raise BadInput("this is a folder", where=destination, advice="name the file that shall be written")
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
            yield Path(scratch) / destination.name
            for made in sorted(Path(scratch).iterdir(), reverse=True):  # `.data` before what refers to it
                made.chmod(0o644)
                made.replace(destination.parent / made.name)


def _check_replaceable(destination: Path) -> None:
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise BadInput("this exists and is not a folder", where=destination, advice="choose another output folder")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MANIFEST).is_file():
        raise BadInput(
            "this folder exists and is not an output of planish",
            where=destination,
            advice="choose another, or remove it",
        )


@contextmanager
def _clear_errors(destination: Path) -> Iterator[None]:
    """Say plainly that the disk is full or that the place cannot be written."""
    try:
        yield
    except OSError as error:
        if is_no_room(error):
            raise OutOfResources(
                f"there is no room to write ({error.strerror or error})",
                where=destination,
                advice="free some space and run again",
            ) from error
        if error.errno in _UNWRITABLE:
            raise BadInput(f"this cannot be written ({error.strerror})", where=destination) from error
        raise


@contextmanager
def _handling(handler: Callable[[int, object], None], *kinds: signal.Signals) -> Iterator[None]:
    """Answer these signals with ``handler`` inside; in another thread than the main one, whoever runs us there does."""
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread
        before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def _terminating() -> AbstractContextManager[None]:
    """Let a polite request to end (SIGTERM) unwind like Ctrl-C, so that nothing half-written stays."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    return _handling(interrupt, signal.SIGTERM)


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block ends: torch aborts the process if they come while it traces."""
    caught: list[int] = []
    with _handling(lambda number, _: caught.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    if caught:
        raise KeyboardInterrupt


def _sweep(destination: Path) -> None:
    """Remove what killed runs for the same destination left: those whose lock nobody holds."""
    for left in destination.parent.glob(f".{destination.name}.*.partial"):
        with suppress(Timeout, OSError), FileLock(left / _LOCK, timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Plain modes, and everything on the disk before the folder gets its name."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(staging: Path, destination: Path) -> None:
    if not destination.exists():
        staging.rename(destination)
    elif not _exchange(staging, destination):
        old = staging.with_suffix(".old")
        destination.rename(old)
        staging.rename(destination)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return int(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0
