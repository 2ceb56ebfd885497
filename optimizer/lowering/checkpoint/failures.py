"""What transformers, torch and peft raise over the files of others, told as ours.

They raise exceptions of every type over a checkpoint that is not as they expect: AssertionError, AttributeError,
types of their own. None of these is a bug of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from planish.optimizer.errors import BadInput, MissingRuntime, OutOfResources, PlanishError, in_one_line, is_no_room

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@contextmanager
def told_as_bad_input(what: str, where: object, advice: str | None = None) -> Iterator[None]:
    """Turn every exception that is raised inside and is not ours into BadInput: ``what``, and why.

    A package that is missing is MissingRuntime, memory that is used up OutOfResources. An error of the disk is left as
    it is.
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
    """The message of an exception in one line, with its type: of an AssertionError that is often all there is."""
    return f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")
