"""Comparisons of outputs with those of the reference, and of calls with the refusals that are due."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from planish.optimizer.errors import BadInput, CheckFailed
from planish.optimizer.fidelity.metrics import compare
from planish.optimizer.ir.program import Arrays, Program
from planish.optimizer.testing.programs import expected
from planish.optimizer.testing.subject import Subject, demand


def demand_close(
    subject: Subject, program: Program, cases: Sequence[Arrays], outputs: Sequence[dict[str, np.ndarray]]
) -> None:
    """CheckFailed if outputs are not those of the reference."""
    demand_budget(subject, program, cases, expected(program, cases), outputs, "outputs differ from the reference")


def demand_scores(subject: Subject, program: Program, wanted: np.ndarray, scores: np.ndarray) -> None:
    """CheckFailed if scores of steps are not those of the whole text."""
    what = "steps behind a cache differ from the whole text"
    demand_budget(subject, program, [{}], [{"logits": wanted}], [{"logits": scores}], what)


def demand_budget(
    subject: Subject,
    program: Program,
    cases: Sequence[Arrays],
    wanted: Sequence[dict[str, np.ndarray]],
    outputs: Sequence[dict[str, np.ndarray]],
    otherwise: str,
) -> None:
    """CheckFailed if outputs are outside of the budget, are missing or have another shape."""
    try:
        violations = subject.budget.violations(compare(program.sole()[1], cases, wanted, outputs))
    except ValueError as error:
        raise CheckFailed(f"{otherwise}: {error}") from error
    demand(not violations, f"{otherwise}: {'; '.join(violations)}")


def demand_refusal(call: Callable[[], object], what: str) -> None:
    """CheckFailed if a call takes what it should refuse with BadInput."""
    try:
        call()
    except BadInput:
        return
    except Exception as error:
        raise CheckFailed(f"{what}: it raises {type(error).__name__} instead of BadInput") from error
    raise CheckFailed(f"{what}: it is taken, instead of BadInput")
