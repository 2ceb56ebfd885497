"""The arithmetic that engines of a target compute in: what loaders get without options where that keeps the budget.

An ordinary loader decides the arithmetic of a file by itself, and no file can tell it otherwise (decision 40). The
engine to beat is therefore the plain lowering as such a loader runs it (decision 50).
"""

from __future__ import annotations

from collections.abc import Sequence

from planish.optimizer.compilation.emission import PlainEngine
from planish.optimizer.compilation.job import Job
from planish.optimizer.compilation.verdicts import judge
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.engine_check import UNUSABLE
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.output.lock import Selection
from planish.optimizer.pipeline import presets


def arithmetics_of(job: Job, target: Backend, locked: Selection | None) -> tuple[Backend, ...]:
    """The target in each arithmetic that its engines may compute in, in order of preference.

    That is the one of the lock; without it, `Backend.arithmetics` for a preset that rounds, if engines can be compared
    and timed here.
    """
    if locked is not None:
        return (locked_target(locked),)
    rounds = bool(presets.budget(job.request.preset).clauses)
    return target.arithmetics if rounds and job.may_time(target) else (target,)


def locked_target(locked: Selection) -> Backend:
    """The target of a lock in the arithmetic that was chosen; BadInput if that is another target."""
    target = registry.backend(locked.target)
    opened = registry.backend(locked.opened_as or locked.target)
    if opened.name != target.name:
        raise BadInput(f"an engine for {target.name} cannot be opened as {opened}")
    return opened


def plain_engine(job: Job, arithmetics: Sequence[Backend]) -> PlainEngine:
    """The engine to beat: the plain lowering in the first arithmetic that keeps the budget, else in the last."""
    for index, target in enumerate(arithmetics[:-1]):
        plain = PlainEngine(job, tuple(arithmetics[index:]))
        try:
            verdict = judge(job, plain, target, plain.place, dict.fromkeys(job.program.components, ()))
        except UNUSABLE as error:
            job.stages.tell(f"{target} does not run: {error}")
            continue
        if not verdict.violations:
            return plain
    return PlainEngine(job, tuple(arithmetics[-1:]))
