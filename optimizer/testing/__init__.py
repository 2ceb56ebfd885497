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

from collections.abc import Mapping

from planish.optimizer.errors import PlanishError, UsageError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.interfaces import option_text
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.system.scratch import scratch_folder
from planish.optimizer.testing import description, engines
from planish.optimizer.testing.subject import NotApplicable, Subject

__all__ = ["CHECKS", "check_backend", "run_check"]

_CHECKS = {**description.CHECKS, **engines.CHECKS}
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
    with scratch_folder() as folder:
        try:
            _CHECKS[name](Subject(backend, folder, Budget.parse(keep)))
        except NotApplicable as reason:
            return str(reason)
        except PlanishError as error:
            error.where = f"target {backend}, check {name}" + ("" if error.where is None else f", {error.where}")
            raise
        except Exception as error:
            error.add_note(f"in the check {name} of target {backend}")
            raise
    return None


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
    target = backend() if isinstance(backend, type) else backend
    skipped = dict(without or {})
    for name in CHECKS:
        reason = None if name in skipped else run_check(name, target, keep)
        skipped |= {} if reason is None else {name: reason}
    return skipped
