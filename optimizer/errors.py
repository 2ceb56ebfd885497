"""Errors of Planish, as one small tree.

Every error says *what* happened, *where*, and *what to do*; it prints as one line and carries the exit code that
the command line returns for it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST = 2000
"""Characters of one part of a message: names in a hostile file may have millions."""
_SAID = 300
"""Characters of what a library says: some print whole graphs."""


def printable(text: str) -> str:
    """``text`` whose control characters are escaped, so that no name in a file can steer a terminal; lines stay lines.

    Unpaired surrogates are escaped too: standard output cannot encode them.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def _shown(text: str) -> str:
    half = _LONGEST // 2
    return printable(text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}")


def in_one_line(error: BaseException) -> str:
    """The beginning of an exception's message, without line breaks."""
    return " ".join(str(error).split())[:_SAID]


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong with a file's content: where it stands, and what it is."""
    first = error.errors()[0]
    place = ".".join(part for part in map(str, first["loc"]) if part != "[key]") or "the file"
    return f"{place}: {first['msg']}"


class PlanishError(Exception):
    """The root of every error that Planish raises on purpose.

    ``what`` is the fact, ``where`` the file, node or argument it concerns, ``advice`` how to mend it.
    """

    exit_code = 70

    def __init__(
        self, what: str, *, where: object = None, advice: str | None = None, picture: str | None = None
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.advice = advice
        self.picture = picture
        """Lines to show beneath the message: source text with a caret, or a graph with its faults."""
        super().__init__(what)

    def __str__(self) -> str:
        """One line: `where: what; advice`, each shortened and without control characters."""
        line = _shown(self.what) if self.where is None else f"{_shown(self.where)}: {_shown(self.what)}"
        line = line if self.advice is None else f"{line}; {_shown(self.advice)}"
        return " ".join(line.split())


class CheckFailed(PlanishError):
    """A structural check or a budget failed: what was built is not what was asked for."""

    exit_code = 1


class UsageError(PlanishError):
    """The request itself is malformed: an unknown pass, option, target or task."""

    exit_code = 2


class BadInput(PlanishError):
    """A file or folder that was handed in cannot be used."""

    exit_code = 3


class MissingRuntime(PlanishError):
    """A runtime, device or optional package that this step needs is not here."""

    exit_code = 4


class OutOfResources(PlanishError):
    """Disk, memory or time ran out."""

    exit_code = 5


class NoAnswer(OutOfResources):
    """A process of ours gave no answer in time, and was ended."""


class InternalError(PlanishError):
    """A bug of ours; the message names the file that reproduces it."""

    exit_code = 70


_CLASSES: Mapping[str, type[PlanishError]] = {
    kind.__name__: kind
    for kind in (
        PlanishError,
        CheckFailed,
        UsageError,
        BadInput,
        MissingRuntime,
        OutOfResources,
        NoAnswer,
        InternalError,
    )
}
"""The classes that `encode` names."""


def encode(error: PlanishError) -> dict[str, str | None]:
    """Plain data of an error, from which `decode` makes it again in another process.

    An error of a class that somebody else derived from one of ours becomes one of ours: the other process may not know
    that class.
    """
    kind = next(cls for cls in type(error).__mro__ if _CLASSES.get(cls.__name__) is cls)
    parts = {"what": error.what, "where": error.where, "advice": error.advice, "picture": error.picture}
    return {"class": kind.__name__, **parts}


def decode(data: Mapping[str, str | None]) -> PlanishError:
    """The error that `encode` made this data of."""
    kind = _CLASSES[data["class"] or ""]
    return kind(data["what"] or "", where=data["where"], advice=data["advice"], picture=data["picture"])


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = re.compile(r"^\d+ requested and \d+ written$")
"""The message of numpy, which has no error number, when it could write only a part of an array."""


def is_no_room(error: OSError) -> bool:
    """True if an error means that a disk, a quota or a limit on files is used up."""
    return error.errno in _NO_ROOM or (error.errno is None and _SHORT_WRITE.match(str(error)) is not None)


_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.EINVAL,
)  # fmt: skip
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def of_system(error: OSError, writing: Path | None = None) -> PlanishError | None:
    """The error for the user that an error of the system means; None if it names no file, and is a bug of ours.

    ``writing`` is what the user asked us to write: errors of files beneath it, or beside it under a hidden name, are
    told as its own.
    """
    said = error.strerror or str(error)
    if error.errno in _TOO_MANY or "Too many open files" in said:
        return OutOfResources(
            f"the system gives this process no more ({said})", advice="raise its limits (ulimit) and run again"
        )
    name = next((str(name) for name in (error.filename, error.filename2) if isinstance(name, str | Path)), None)
    ours = writing is not None and (name is None or _belongs(Path(name), writing))
    if is_no_room(error):
        where = writing if ours else name
        return OutOfResources(
            f"there is no room to write ({said})", where=where, advice="free some space and run again"
        )
    if ours and error.errno in _UNWRITABLE:
        return BadInput(f"this cannot be written ({said})", where=writing)
    if name is not None:
        return BadInput(f"this cannot be used ({said})", where=name)
    return None


def of_exception(error: BaseException) -> PlanishError | None:
    """The error to tell the user of, for any exception; None if it is a bug of ours."""
    if isinstance(error, PlanishError):
        return error
    if isinstance(error, MemoryError):
        return OutOfResources("memory ran out", advice="close other programs or use a larger machine")
    if isinstance(error, ImportError) and "Too many open files" in str(error):
        return OutOfResources("too many files are open", advice="raise the limit (ulimit -n)")
    return of_system(error) if isinstance(error, OSError) else None


def _belongs(path: Path, destination: Path) -> bool:
    """True for the path of a destination, of a part of it, of a folder above it or of its hidden neighbours."""
    place = Path(os.path.abspath(destination)) if os.path.isabs(path) else destination  # noqa: PTH100, PTH117
    hidden = place.parent / f".{place.name}."
    return (
        path == place or place.is_relative_to(path) or path.is_relative_to(place) or str(path).startswith(str(hidden))
    )
