"""What can go wrong, as one small tree.

Every error says *what* happened, *where*, and *what to do*; it prints as one line and carries the exit code that
the command line returns for it.
"""

from __future__ import annotations

import errno
import re


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
        """One line: `where: what; advice`."""
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        line = line if self.advice is None else f"{line}; {self.advice}"
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


class InternalError(PlanishError):
    """A bug of ours; the message names the file that reproduces it."""

    exit_code = 70


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = re.compile(r"^\d+ requested and \d+ written$")
"""What numpy says, and gives no number for, when it could write only a part of an array."""


def is_no_room(error: OSError) -> bool:
    """Whether an error means that a disk, a quota or a limit on files is used up."""
    return error.errno in _NO_ROOM or (error.errno is None and _SHORT_WRITE.match(str(error)) is not None)
