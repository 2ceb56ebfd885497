"""Dependency file: the files that a build has read, as a rule for make and ninja (`--depfile`).

Both must parse the same names. They agree on few escapes: a backslash before a blank, `#` and `:`, and `$$`. A name
with a character that one of them cannot express is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from planish.optimizer.errors import UsageError
from planish.optimizer.system.staging import staged_file

_ESCAPED = str.maketrans({" ": "\\ ", "#": "\\#", ":": "\\:", "$": "$$"})
_FORBIDDEN = "\\;%\t\r\n"
"""GNU make ends a rule at `;` and uses `%` as a pattern; the two programs treat a backslash before a blank
differently."""


def escaped(path: Path) -> str:
    """A path in the syntax of a depfile; UsageError if make or ninja would read another name."""
    text = str(path)
    if set(text).intersection(_FORBIDDEN):
        shown = " ".join(map(repr, _FORBIDDEN))
        raise UsageError(f"a depfile cannot name {text!r}", where="--depfile", advice=f"use no {shown} in names")
    return text.translate(_ESCAPED)


def write_depfile(depfile: Path, target: Path, inputs: Iterable[Path], written: Sequence[Path] = ()) -> None:
    """Write the rule that ``target`` is rebuilt when one of ``inputs`` is newer.

    Inputs that this run has ``written`` or extended (a lock) get the time of the newest other input, since they follow
    from those. Otherwise the target would be rebuilt at once: ninja compares with the start time of a command.
    """
    paths = list(dict.fromkeys(inputs))
    others = [path.stat().st_mtime_ns for path in paths if path not in written]
    for path in written:
        os.utime(path, ns=(path.stat().st_atime_ns, max(others, default=0)))
    # GNU make reads `target: a=b` as a variable of the target, unless another word stands before it
    paths.sort(key=lambda path: "=" in str(path))
    if paths and "=" in str(paths[0]):
        raise UsageError("a depfile cannot begin with a name that has '='", where=f"--depfile {paths[0]}")
    with staged_file(depfile) as place:
        words = " \\\n  ".join(map(escaped, paths))
        place.write_text(f"{escaped(target)}: {words}\n", encoding="utf-8")
