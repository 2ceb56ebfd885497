"""How failures are told: one line, a picture where it helps, the documented exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

import click

from planish.optimizer.cli.supervising import INTERRUPTED
from planish.optimizer.errors import InternalError, PlanishError, UsageError, in_one_line, of_exception, printable
from planish.optimizer.system import interrupts

UNREAD = 141
"""Nobody reads standard output any more: what shells return for a command that SIGPIPE ended."""


def exit_code_of(error: BaseException) -> int:
    """Tell the user of ``error`` on stderr and return the exit code for it."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if interrupts.interrupted() or isinstance(error, click.Abort | KeyboardInterrupt):  # Abort: what click makes of it
        if not interrupts.watched():
            _tell(interrupts.farewell())
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        text = io.StringIO()
        error.show(file=text)
        _tell(printable(text.getvalue()).rstrip("\n"))
        return UsageError.exit_code
    if isinstance(error, BrokenPipeError) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    ):
        return UNREAD
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    clear = of_exception(error) or _bug(error)
    if clear.picture:
        _tell(printable(clear.picture))
    _tell(f"planish: error: {clear}")
    return clear.exit_code


def finish(code: int) -> int:
    """Write what is left in standard output; the exit code, which is another if nobody reads it or it is full."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What Python could not write it would try to write again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return exit_code_of(error)
    return code


def open_standard_streams() -> None:
    """Give descriptors 0 to 2 something to stand for: the next file that is opened would be taken for them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the end
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def refuse_closed_output() -> None:
    """OSError if who started this process closed its standard output: answers would be lost."""
    if getattr(sys.stdout, "name", None) == 1:  # the stream that stands for it
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")


def _tell(text: str) -> None:
    with suppress(OSError):  # nobody may be there any more to read it
        click.echo(text, err=True)


def _bug(error: BaseException) -> PlanishError:
    """Keep the traceback in a file, and name it; say where it happened if there is no place for a file."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="planish-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"arguments: {sys.argv[1:]}\n")
            file.writelines(traceback.format_exception(error))
        advice = f"please report it with {Path(file.name)}"
    except OSError:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "an unknown place"
        advice = f"please report it; it happened in {place}"
    return InternalError(f"a bug of ours: {type(error).__name__}: {in_one_line(error)}", advice=advice)
