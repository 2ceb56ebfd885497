"""Folders that live as long as the run that made them: a lock beside each tells the next run whether that still lives.

For a destination `out`, and a name of eight letters that the run has found free:

    .out.abcdefgh.lock      held while the run lives; made first and removed last
    .out.abcdefgh.partial   what is being built, later what it has replaced
    .out.abcdefgh.old       where two paths cannot be exchanged in one step: what stood at `out` before

Scratch folders lie in the folder for temporary files and are called `planish-abcdefgh`.
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
"""How scratch folders begin."""
COMMITTED = ".committed"
"""A file in a folder whose other files are complete: whoever finds it moves them to their names."""
_LETTERS = string.ascii_lowercase + string.digits
_LENGTH = 8
_NAME = re.compile(rf"[a-z0-9]{{{_LENGTH}}}")
_ATTEMPTS = 100


@dataclass(frozen=True)
class Claim:
    """The names of one run beside its destination."""

    parent: Path
    stem: str
    """What the names begin with: `.out.abcdefgh`."""

    @property
    def lock(self) -> Path:
        """Held by the run."""
        return self.parent / f"{self.stem}.lock"

    @property
    def folder(self) -> Path:
        """Where it works."""
        return self.parent / f"{self.stem}.partial"

    @property
    def old(self) -> Path:
        """Where it puts what it replaces, if two paths cannot be exchanged."""
        return self.parent / f"{self.stem}.old"

    def remove(self) -> None:
        """Remove the folders, then the lock: as long as something is left, the next run tries again."""
        for place in (self.folder, self.old):
            shutil.rmtree(place, ignore_errors=True)  # follows no links
        if not os.path.lexists(self.folder) and not os.path.lexists(self.old):
            self.lock.unlink(missing_ok=True)


Recover = Callable[[Claim], None]
"""Finishes or takes back what a killed run had begun, before its folders are removed."""


def sweep(parent: Path, prefix: str, recover: Recover = lambda _: None) -> None:
    """Remove what killed runs left behind ``prefix``: those whose lock nobody holds. Others' files are left alone."""
    for stem in sorted(_stems(parent, prefix)):
        claim = Claim(parent, stem)
        with suppress(Timeout, OSError), FileLock(claim.lock, timeout=0):
            recover(claim)
            claim.remove()


def _stems(parent: Path, prefix: str) -> Iterator[str]:
    """Of locks that this user made and whose names are like ours; never links, which may lead anywhere."""
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
    """A new claim; its folder exists inside, and everything of it is gone behind."""
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
    """A folder for what is only needed meanwhile, below ``parent`` or in the folder for temporary files.

    Those of killed runs are removed before. BadInput if there is no such folder, OutOfResources if it is full.
    """
    place = temporary() if parent is None else parent
    interrupts.report("scratch", str(place))
    with ExitStack() as stack:
        with _telling(place):
            sweep(place, PREFIX)
            claim = stack.enter_context(claimed(place, PREFIX))
        yield claim.folder


def scratch_file() -> IO[Any]:
    """A file without a name, gone when it is closed."""
    with _telling(temporary()):
        return tempfile.TemporaryFile()


def temporary() -> Path:
    """The folder for temporary files. BadInput if there is none, OutOfResources if none has room."""
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
