"""Atomic output: a folder or file is complete or absent, also if the process is killed.

A folder is built under a hidden name beside its destination and renamed in one step. An existing output is exchanged in
one step (renameat2 on Linux). The next run completes, reverts or removes the files of a killed run; a lock beside them
shows whether their owner is alive (`system/scratch.py`).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from planish.optimizer.errors import BadInput, UsageError, of_system
from planish.optimizer.system import interrupts
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.scratch import COMMITTED, Claim, claimed, sweep

MANIFEST = "planish.json"
MEASUREMENTS = "measurements.json"
MEASURED = frozenset({MEASUREMENTS, "measurements.html"})
"""Files of an output that differ between equal builds."""
MADE_LATER = {"model.plan"}
"""Files that scripts in an output write later: TensorRT's plan."""
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_SHOWN = 3
_LETTERS = 9
"""Length of the unique suffix of a claim's name, with the dot before it."""


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A folder to build in. It becomes ``destination`` if the block succeeds, and is removed if it fails.

    ``destination`` may be missing, an empty folder, or an earlier output of Planish, which is replaced unless it holds
    a file that its manifest does not list. BadInput if something else exists there or the place is not writable;
    OutOfResources if the disk is full.
    """
    with _clear_errors(destination):
        destination = Path(os.path.abspath(destination))  # noqa: PTH100 - resolve() would follow a link we must replace
        with _staged(destination, _restore) as claim:
            _check_replaceable(destination)
            yield claim.folder
            _settle(claim.folder)
            _move(claim, destination)


@contextmanager
def staged_file(destination: Path) -> Iterator[Path]:
    """A path for a file and its `.data` companion; both move to ``destination`` if the block succeeds."""
    with _clear_errors(destination):
        destination = Path(os.path.abspath(destination))  # noqa: PTH100 - a link there is replaced, not what it leads to
        refuse_as_file(destination)
        with _staged(destination, _commit) as claim:
            yield claim.folder / destination.name
            _settle(claim.folder)
            with interrupts.uninterrupted():
                interrupts.moving(claim.folder / destination.name, destination)
                (claim.folder / COMMITTED).touch()
                _commit(claim, destination)


def refuse_as_file(destination: Path) -> None:
    """Raise BadInput if a folder, a device, a pipe or a socket has the name of a file that shall be written."""
    try:
        mode = destination.stat().st_mode
    except OSError:  # nothing is there; or a link that leads nowhere, which is replaced
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        what = f"a link to {kind}" if destination.is_symlink() else kind
        raise BadInput(f"this is {what}", where=destination, advice="name the file that shall be written")


def demand_apart(out: Path, read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Raise UsageError if the inputs or other outputs overlap with the folder ``out``.

    The folder is replaced as a whole, and files in it would be lost.
    """
    place = _real(out)
    for name, path in {**read, **written}.items():
        if path is None:
            continue
        real = _real(path)
        if real.is_relative_to(place):
            raise UsageError(
                f"this lies inside the output folder {out}, which is replaced as a whole",
                where=f"{name} {path}",
                advice="choose another place for one of them",
            )
        if name in read and place.is_relative_to(real):
            raise UsageError(
                f"the output folder {out} lies inside this, which is only read",
                where=f"{name} {path}",
                advice="choose another output folder",
            )
    demand_not_read(read, written)


def demand_not_read(read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Raise UsageError if a file would overwrite an input."""
    sources = {_real(path): f"{name} {path}" for name, path in read.items() if path is not None}
    for name, path in written.items():
        if path is not None and _real(path) in sources:
            raise UsageError(
                f"this would be written over {sources[_real(path)]}",
                where=f"{name} {path}",
                advice="name another file",
            )


def _real(path: Path) -> Path:
    """The path without links; unchanged if it cannot be resolved (too long, a circular link)."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError):
        return Path(path)


@contextmanager
def _staged(destination: Path, recover: Callable[..., None]) -> Iterator[Claim]:
    """A claim beside ``destination``, after the cleanup of killed runs."""
    prefix = f".{destination.name}."
    with _created(destination.parent):
        interrupts.report("output", str(destination), recover is _commit)
        sweep(destination.parent, prefix, functools.partial(recover, destination=destination))
        with interrupts.terminating(), claimed(destination.parent, prefix) as claim:
            yield claim


@contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents. If the block fails, those that are empty are removed."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    created: list[Path] = []
    try:
        for place in reversed(missing):
            with suppress(FileExistsError):  # another run was quicker
                place.mkdir()
                created.append(place)
                interrupts.report("made", str(place))
        folder.mkdir(exist_ok=True)  # complains if something else stands there
        yield
    except BaseException:
        remove_empty(created)
        raise


def remove_empty(created: Sequence[Path]) -> None:
    """Remove created folders, the last one first, while they are empty."""
    for place in reversed(created):
        with suppress(OSError):
            place.rmdir()


def sweep_up(destination: Path, *, is_file: bool) -> None:
    """Complete, revert or remove the files of a killed run beside ``destination``."""
    recover = functools.partial(_commit if is_file else _restore, destination=destination)
    sweep(destination.parent, f".{destination.name}.", recover)


def _check_replaceable(destination: Path) -> None:
    """Raise BadInput if the replacement would remove files that a build does not write."""
    before = _identity(destination)
    while before is not None:
        try:
            _check_content(destination)
        except (BadInput, FileNotFoundError):
            # Another run may have put a new folder there, or be about to, and be removing the one that was looked at.
            after = _identity(destination)
            if after == before:
                raise
            before = after
        else:
            return


def _identity(destination: Path) -> tuple[int, int] | None:
    """Identity of a folder, which a later folder of the same name (or inode) does not share; None if it does not exist.

    BadInput if the path is not a folder.
    """
    try:
        status = destination.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        link = stat.S_ISLNK(status.st_mode)
        what = "is a link, which is neither followed nor replaced" if link else "exists and is not a folder"
        advice = "choose another output folder, or name the folder itself" if link else "choose another output folder"
        raise BadInput(f"this {what}", where=destination, advice=advice)
    return status.st_ino, status.st_ctime_ns


def _check_content(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in _below(folder)}
    if not names:
        return
    if MANIFEST not in names:
        raise BadInput(
            "this folder exists and is not an output of planish", where=folder, advice="choose another, or remove it"
        )
    listed = read_object(folder / MANIFEST).get("files")
    expected = {MANIFEST, *MEASURED, *(listed if isinstance(listed, dict) else ())}
    strange = sorted(name for name in names - expected if Path(name).name not in MADE_LATER)
    if strange:
        raise BadInput(
            f"planish did not write {some_of(strange)} in this folder, and would remove it",
            where=folder,
            advice="move it elsewhere, or choose another output folder",
        )


def some_of(names: Sequence[str]) -> str:
    """The first names, and the number of further ones, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(map(repr, names[:_SHOWN]))}{more}"


def _below(folder: Path) -> Iterator[Path]:
    """All files and links in ``folder``. BadInput if this user cannot empty one of its folders."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        if not os.access(place, os.W_OK | os.X_OK):
            raise BadInput("this cannot be replaced: this user may not write there", where=place)
        yield from (Path(place, name) for name in files)
        yield from (Path(place, name) for name in folders if Path(place, name).is_symlink())


@contextmanager
def _clear_errors(destination: Path) -> Iterator[None]:
    """Turn errors of the file system (disk full, not writable, file unusable) into clear messages."""
    try:
        yield
    except OSError as error:
        clear = of_system(error, writing=destination)
        if clear is None:
            raise
        raise clear from error


def _settle(folder: Path) -> None:
    """Set default modes, and flush all files to disk before the rename."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(claim: Claim, destination: Path) -> None:
    """Rename the new folder to its destination. The replaced output is then in the claim's folder or its old one."""
    with interrupts.uninterrupted():
        interrupts.moving(claim.folder, destination)
        while not _moved(claim, destination):
            pass  # another run was quicker: what it put there is exchanged in turn


def _moved(claim: Claim, destination: Path) -> bool:
    if not os.path.lexists(destination):
        try:
            claim.folder.rename(destination)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True
    _check_replaceable(destination)
    try:
        exchanged = _exchange(claim.folder, destination)
    except FileNotFoundError:
        return False
    if not exchanged:
        return _replaced(claim, destination)
    if _strange(claim.folder):  # put there while we looked away
        try:
            back = _exchange(claim.folder, destination)
        except FileNotFoundError:
            back = False
        if not back:
            _put_back(claim.folder, destination)
        return False
    return True


def _replaced(claim: Claim, destination: Path) -> bool:
    """Replace in two steps, if paths cannot be exchanged. After a kill in between, the next run restores the old
    output."""
    try:
        destination.rename(claim.old)
    except FileNotFoundError:
        return False
    if _strange(claim.old):  # put there while we looked away
        _put_back(claim.old, destination)
        return False
    try:
        claim.folder.rename(destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            _rescued(claim.old, destination)
            raise
        shutil.rmtree(claim.old, ignore_errors=True)  # another run was quicker, and its output is newer
        return False
    return True


def _put_back(folder: Path, destination: Path) -> None:
    """Restore the name of a folder with files of others; BadInput with its location if another run took the name."""
    kept = _rescued(folder, destination)
    if kept != destination:
        raise BadInput(f"another run wrote this meanwhile; what was in it before is kept in {kept}", where=destination)


def _rescued(folder: Path, destination: Path) -> Path:
    """The location of a folder with files of others: its old name, or a name beside it if that is taken."""
    kept = destination.with_name(f"{destination.name}.kept{folder.stem[-_LETTERS:]}")
    for place in (destination, kept):
        try:
            return folder.rename(place)
        except OSError as error:
            if place is kept or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    return kept


def _strange(folder: Path) -> bool:
    """True if a folder holds files that no build writes, or cannot be read."""
    try:
        _check_content(folder)
    except (BadInput, OSError):
        return True
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if int(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _restore(claim: Claim, destination: Path) -> None:
    """Restore ``destination`` if a run was killed between the two renames."""
    if claim.old.is_dir() and (not os.path.lexists(destination) or _strange(claim.old)):
        _rescued(claim.old, destination)


def _commit(claim: Claim, destination: Path) -> None:
    """Move complete files to their names. A graph is never beside the weights of another graph.

    Names are fixed, so new weights replace old ones under the same name. The old graph is removed first: a kill in
    between leaves no graph instead of a wrong one, and the next run continues here.
    """
    if not (claim.folder / COMMITTED).is_file():
        return
    files = sorted((path for path in claim.folder.iterdir() if path.name != COMMITTED), reverse=True)
    if len(files) > 1 and (claim.folder / destination.name).exists():
        destination.unlink(missing_ok=True)
    for path in files:  # `.data` before what refers to it
        path.replace(destination.parent / path.name)
