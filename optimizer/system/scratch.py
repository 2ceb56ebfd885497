"""Folders with the lifetime of a run: a lock beside each shows the next run whether its owner is alive.

For a destination `out`, and a free name of eight letters:

    .out.abcdefgh.lock      locked while the run is alive; created first and removed last
    .out.abcdefgh.partial   the new output, later the replaced one
    .out.abcdefgh.old       the replaced output, on systems that cannot exchange two paths in one step

Scratch folders are in the folder for temporary files, with names `planish-abcdefgh`.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import stat
import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from planish.optimizer.errors import BadInput, OutOfResources, is_no_room, of_system
from planish.optimizer.system import interrupts

PREFIX = "planish-"
"""Prefix of scratch folders."""
COMMITTED = ".committed"
"""Marker of a folder whose other files are complete; the next run moves them to their names."""
_LETTERS = string.ascii_lowercase + string.digits
_LENGTH = 8
_NAME = re.compile(rf"[a-z0-9]{{{_LENGTH}}}")
_ATTEMPTS = 100


@dataclass(frozen=True)
class Claim:
    """The names of one run beside its destination."""

    parent: Path
    stem: str
    """Prefix of the names: `.out.abcdefgh`."""

    @property
    def lock(self) -> Path:
        """The lock file of the run."""
        return self.parent / f"{self.stem}.lock"

    @property
    def folder(self) -> Path:
        """The working folder."""
        return self.parent / f"{self.stem}.partial"

    @property
    def old(self) -> Path:
        """The replaced output, if two paths cannot be exchanged."""
        return self.parent / f"{self.stem}.old"

    def remove(self) -> None:
        """Remove the folders, then the lock. If something is left, the lock stays and the next run tries again."""
        for place in (self.folder, self.old):
            shutil.rmtree(place, ignore_errors=True)  # follows no links
        if not os.path.lexists(self.folder) and not os.path.lexists(self.old):
            self.lock.unlink(missing_ok=True)


Recover = Callable[[Claim], None]
"""Function that completes or reverts the moves of a killed run, before its folders are removed."""


def sweep(parent: Path, prefix: str, recover: Recover = lambda _: None) -> None:
    """Remove the folders of killed runs with this prefix: those whose lock is free. Other files are not touched."""
    for stem in sorted(_stems(parent, prefix)):
        claim = Claim(parent, stem)
        with suppress(Timeout, OSError), FileLock(claim.lock, timeout=0):
            recover(claim)
            claim.remove()


def _stems(parent: Path, prefix: str) -> Iterator[str]:
    """Stems of the lock files of this user that match our names. Links are skipped, since their targets are unknown."""
    # A user may have any character in the name of an output: `[a]` and `*` are no patterns here.
    for path in parent.glob(f"{glob.escape(prefix)}*.lock"):
        stem = path.name.removesuffix(".lock")
        with suppress(OSError):
            status = path.lstat()
            if _NAME.fullmatch(stem[len(prefix) :]) and stat.S_ISREG(status.st_mode) and _is_ours(status):
                yield stem


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()  # Windows names owners otherwise


@contextmanager
def claimed(parent: Path, prefix: str) -> Iterator[Claim]:
    """A new claim, whose folder exists in the block and is removed after it."""
    claim, lock = _claim(parent, prefix)
    try:
        claim.folder.mkdir(mode=0o700)
        yield claim
    finally:
        claim.remove()
        lock.release()


def _claim(parent: Path, prefix: str) -> tuple[Claim, FileLock]:
    for _ in range(_ATTEMPTS):
        claim = Claim(parent, prefix + "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH)))
        if os.path.lexists(claim.folder):
            continue
        lock = FileLock(claim.lock)
        with suppress(Timeout):  # somebody sweeps it already
            lock.acquire(timeout=0)
            return claim, lock
    raise FileExistsError(errno.EEXIST, "no name is free", str(parent))


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A scratch folder for the block, below ``parent`` or in the folder for temporary files.

    Folders of killed runs are removed first. BadInput without such a folder, OutOfResources if it is full.
    """
    place = temporary() if parent is None else parent
    interrupts.report("scratch", str(place))
    with ExitStack() as stack:
        with _telling(place):
            sweep(place, PREFIX)
            claim = stack.enter_context(claimed(place, PREFIX))
        yield claim.folder


def scratch_file() -> IO[Any]:
    """A file without a name; it is removed when it is closed."""
    with _telling(temporary()):
        return tempfile.TemporaryFile()


def temporary() -> Path:
    """The folder for temporary files. BadInput if there is none, OutOfResources if none has space."""
    try:
        return Path(os.path.abspath(tempfile.gettempdir()))  # noqa: PTH100 - a link is as good as a folder here
    except OSError as error:  # tempfile has tried TMPDIR, /tmp, /var/tmp, /usr/tmp and this folder
        if is_no_room(error):
            raise OutOfResources("no folder for temporary files has room", advice="set TMPDIR to one") from error
        raise BadInput(
            "no folder for temporary files can be written", where="TMPDIR", advice="set TMPDIR to one that can"
        ) from error


@contextmanager
def _telling(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        clear = of_system(error, writing=place)
        if clear is None:
            raise
        clear.advice = "free some space, or set TMPDIR to another folder"
        raise clear from error
