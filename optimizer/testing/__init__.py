"""Conformance tests for backends: for their authors, who run them on a class of their own.

    from planish.optimizer.testing import check_backend

    check_backend(YourBackend)

One check a test, with pytest:

    @pytest.mark.parametrize("name", CHECKS)
    def test_conformance(name):
        reason = run_check(name, YourBackend())
        if reason is not None:
            pytest.skip(reason)
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from planish.optimizer.errors import CheckFailed, PlanishError, UsageError, in_one_line
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.interfaces import option_text
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.system.scratch import scratch_folder
from planish.optimizer.testing import description, emission, engines
from planish.optimizer.testing.subject import NotApplicable, Subject, demand

__all__ = ["CHECKS", "check_backend", "run_check"]

_CHECKS = {**description.CHECKS, **emission.CHECKS, **engines.CHECKS}
CHECKS = tuple(_CHECKS)
"""Names of the checks, in the order in which they run."""
KEEP = ("max_rel<=1e-3", "cosine_min>=0.9999")
"""How close outputs must be to the reference, unless something else is said."""


def run_check(name: str, backend: Backend, keep: tuple[str, ...] = KEEP) -> str | None:
    """Run one check; the reason if it does not apply here, None if it holds.

    ``keep`` is the budget of outputs, for targets whose options round. CheckFailed says what does not hold.
    """
    if name not in _CHECKS:
        raise UsageError(f"unknown check {name!r}{option_text.did_you_mean(name, CHECKS)}")
    where = f"target {_text_of(backend)}, check {name}"
    with scratch_folder() as folder:
        try:
            _CHECKS[name](Subject(backend, folder, Budget.parse(keep)))
        except NotApplicable as reason:
            return str(reason)
        except PlanishError as error:
            error.where = where + ("" if error.where is None else f", {error.where}")
            raise
        except Exception as error:  # the traceback is that of the cause
            raise CheckFailed(_told(error, type(backend)), where=where) from error
    return None


def _text_of(backend: Backend) -> str:
    """The text form of a target; CheckFailed for what is no target, or has no text form."""
    cls = type(backend)
    demand(isinstance(backend, Backend), f"{cls.__name__} does not derive from planish.optimizer.Backend")
    if not isinstance(getattr(cls, "name", None), str):  # a check says so; the text form needs it
        return cls.__name__
    try:
        return str(backend)
    except Exception as error:
        raise CheckFailed(f"the text form of {cls.__name__} cannot be made: {_told(error, cls)}") from error


def _told(error: Exception, cls: type[Backend]) -> str:
    """An exception in one line: where in the package of a backend it came through, and what it says."""
    source = getattr(sys.modules.get(cls.__module__), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if source is not None and Path(frame.filename).parent == Path(source).parent]
    last = [*frames, *inside][-1]
    place = f"{last.name} ({Path(last.filename).name}, line {last.lineno})"
    return f"{type(error).__name__} in {place}: {in_one_line(error) or 'it has no message'}"


def check_backend(
    backend: type[Backend] | Backend, *, without: Mapping[str, str] | None = None, keep: tuple[str, ...] = KEEP
) -> dict[str, str]:
    """Run all checks on a backend, with its default options if it is a class.

    ``without`` are checks of what the backend does not claim, each with its reason: `{"threads": "one at a time"}`.
    Returns the checks that did not apply, with their reasons; CheckFailed says what does not hold.
    """
    unknown = sorted(set(without or {}) - _CHECKS.keys())
    if unknown:
        raise UsageError(f"unknown check {unknown[0]!r}{option_text.did_you_mean(unknown[0], CHECKS)}")
    target = _made(backend) if isinstance(backend, type) else backend
    skipped = dict(without or {})
    for name in CHECKS:
        reason = None if name in skipped else run_check(name, target, keep)
        skipped |= {} if reason is None else {name: reason}
    return skipped


def _made(cls: type[Backend]) -> Backend:
    """A target with the default options of its class; CheckFailed if there is none."""
    demand(issubclass(cls, Backend), f"{cls.__name__} does not derive from planish.optimizer.Backend")
    demand(not inspect.isabstract(cls), str(option_text.member_fault(cls)))
    try:
        return cls()
    except Exception as error:
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise CheckFailed(
            f"{cls.__name__}() makes no target ({reason})", advice="give each option a default"
        ) from error
