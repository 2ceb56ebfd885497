"""Verdicts: how close an emitted engine is to the reference, and the budgets that it must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planish.optimizer.compilation.emission import PlainEngine
from planish.optimizer.compilation.job import Checks, Job
from planish.optimizer.fidelity.budget import Budget, Clause, metrics_of
from planish.optimizer.fidelity.engine_check import Fidelity, check_as_loaders_open, check_engines, demand_room
from planish.optimizer.fidelity.metrics import CONTINUED, JUDGED, Comparison
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.fidelity.user_metric import scored
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Pass

NOT_CHECKED = "NOT CHECKED"
"""The note on an engine that was compared with nothing."""
OFFLOADED = "weights stay in their files"
"""The reason why something was not done that needs all weights in memory."""
_SAME_TOKENS = (Clause("kl", "<=", 1e-6), Clause("greedy", ">=", 1.0))
"""Budget of the continuations of an exact engine."""


@dataclass(frozen=True)
class Verdict:
    """The fidelity of an engine, and the budgets of its parts."""

    budgets: Parts[Budget]
    fidelity: Fidelity

    @property
    def violations(self) -> list[str]:
        """One text for each condition of the budgets that does not hold."""
        return self.fidelity.violations(self.budgets)

    @property
    def error(self) -> float:
        """How far the outputs are from the reference: one minus the worst cosine, else the worst relative error."""
        comparison = self.fidelity.comparison()
        cosine, relative = comparison.worst("cosine"), comparison.worst("max_rel")
        return 1 - cosine if cosine is not None else relative or 0.0


def judge(job: Job, plain: PlainEngine, target: Backend, place: Path, passes: Mapping[str, Sequence[Pass]]) -> Verdict:
    """Check the engine in ``place``, made by these passes for each component, on every reference input."""
    return Verdict(budgets_of(job, target, passes), _fidelity(job, plain, target, place))


def judge_as_loaders_open(job: Job, target: Backend, place: Path) -> Fidelity | None:
    """The fidelity of an engine that is opened without options; None if that opens the same, or nothing is compared."""
    default = target.as_loaders_open() if job.checks is Checks.FULL else None
    if default is None or job.references is None:
        return None
    with job.stages.stage(f"{target.name}: check as loaders open it", counts=False):
        return check_as_loaders_open(default, place, job.program.signatures, job.references())


def budgets_of(job: Job, target: Backend, passes: Mapping[str, Sequence[Pass]]) -> Parts[Budget]:
    """The budgets of an engine, given the passes that made each component.

    As long as all of them are exact, and the target is or no budget was asked for, no token of the continuations may
    differ.
    """
    if job.references is None:
        return Parts({})
    references, asked = job.references(), job.request.asked
    bent = target.rounds and bool(asked.clauses)
    exact = {name: not bent and all(step.exact for step in steps) for name, steps in passes.items()}
    continued = asked.only(CONTINUED) if references.continuations else Budget()
    judged = asked.only(JUDGED) if job.request.evaluation is not None else Budget()
    budgets = {}
    for name in passes:
        signature = job.program.signatures[name]
        # Clauses on continuations or on the user's metric hold for all components together: no default steers then.
        whole = bool(continued.clauses or judged.clauses)
        kept = asked.only(metrics_of(signature)) if whole else job.request.steering(signature)
        noise = references.components[name].exact_budget().clauses if exact[name] else ()
        budgets[name] = Budget((*noise, *kept.clauses))
    same = Budget((*(_SAME_TOKENS if all(exact.values()) else ()), *continued.clauses))
    return Parts(
        budgets,
        continuations=same if references.continuations else None,
        evaluation=None if job.request.evaluation is None else judged,
    )


def _fidelity(job: Job, plain: PlainEngine, target: Backend, place: Path) -> Fidelity:
    if job.references is None:
        return Fidelity(Parts({}), NOT_CHECKED, 0)
    offload = job.checks is Checks.OFFLOAD
    if offload:
        demand_room(target, sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))
    fidelity = check_engines(target, place, job.program.signatures, job.references(), mapped=offload)
    evaluation = job.request.evaluation
    if evaluation is None:
        return fidelity
    score = evaluation.score(place)
    relative = any(clause.metric == "score_ratio" for clause in job.request.asked.clauses)
    comparison = Comparison({"engine": scored(score, plain.score if relative else None)})
    return replace(fidelity, comparisons=replace(fidelity.comparisons, evaluation=comparison))
