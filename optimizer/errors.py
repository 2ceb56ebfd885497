"""What can go wrong, as one small tree.

Every error says *what* happened, *where*, and *what to do*; it prints as one line and carries the exit code that
the command line returns for it.
"""

from __future__ import annotations

import errno
import re

_LONGEST = 2000
"""Characters of one part of a message: names in a hostile file may have millions."""


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


class InternalError(PlanishError):
    """A bug of ours; the message names the file that reproduces it."""

    exit_code = 70


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = re.compile(r"^\d+ requested and \d+ written$")
"""What numpy says, and gives no number for, when it could write only a part of an array."""


def is_no_room(error: OSError) -> bool:
    """Whether an error means that a disk, a quota or a limit on files is used up."""
    return error.errno in _NO_ROOM or (error.errno is None and _SHORT_WRITE.match(str(error)) is not None)
