"""How failures are told: one line, a picture where it helps, the documented exit code, never a traceback."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import click

from planish.optimizer.errors import InternalError, OutOfResources, PlanishError, UsageError, is_no_room

INTERRUPTED = 130
"""What shells return for a command that Ctrl-C ended."""


def exit_code_of(error: Exception) -> int:
    """Tell the user of ``error`` on stderr and return the exit code for it."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.Abort):  # what click makes of Ctrl-C
        click.echo("planish: interrupted; nothing was written", err=True)
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show(file=sys.stderr)
        return UsageError.exit_code
    known = _as_ours(error)
    if known.picture:
        click.echo(known.picture, err=True)
    click.echo(f"planish: error: {known}", err=True)
    return known.exit_code


def _as_ours(error: Exception) -> PlanishError:
    if isinstance(error, PlanishError):
        return error
    if isinstance(error, MemoryError):
        return OutOfResources("memory ran out", advice="close other programs or use a larger machine")
    if isinstance(error, OSError) and is_no_room(error):
        return OutOfResources(
            f"there is no room to write ({error.strerror or error})", where=error.filename, advice="free some space"
        )
    return _bug(error)


def _bug(error: Exception) -> PlanishError:
    """Keep the traceback in a file, and name it."""
    with tempfile.NamedTemporaryFile("w", prefix="planish-bug-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"arguments: {sys.argv[1:]}\n")
        file.writelines(traceback.format_exception(error))
    return InternalError(
        f"a bug of ours: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
        advice=f"please report it with {Path(file.name)}",
    )
