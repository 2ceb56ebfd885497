"""Exceptions of transformers, torch and peft for untrusted files, converted to our errors.

For an unexpected checkpoint they raise exceptions of every type: AssertionError, AttributeError, their own types. None
of these is a bug of Planish.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from planish.optimizer.errors import BadInput, MissingRuntime, OutOfResources, PlanishError, in_one_line, is_no_room

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@contextmanager
def told_as_bad_input(what: str, where: object, advice: str | None = None) -> Iterator[None]:
    """Convert foreign exceptions in the block to BadInput with the message ``what`` and the cause.

    A missing package becomes MissingRuntime, exhausted memory OutOfResources. Errors of the file system propagate.
    """
    try:
        yield
    except PlanishError:
        raise
    except ImportError as error:
        raise MissingRuntime(
            f"{what}: a package is missing ({_said(error)})", where=where, advice="install it, or give another source"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and is_no_room(error):
            raise
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            raise OutOfResources(f"{what}: it needs more memory than there is ({_said(error)})", where=where) from error
        raise BadInput(f"{what}: {_said(error)}", where=where, advice=advice) from error


def _said(error: Exception) -> str:
    """The message of an exception in one line, with its type: an AssertionError often has no message."""
    return f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")
