"""Candidates: engines that may be shipped for a target, before one of them is selected."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planish.optimizer.calibration.sensitivity import Decision, decisions
from planish.optimizer.compilation.emission import PlainEngine, emit
from planish.optimizer.compilation.job import Checks, Job
from planish.optimizer.compilation.transform import Freedom, Transformed, Transformer
from planish.optimizer.compilation.verdicts import Verdict, budgets_of, judge
from planish.optimizer.fidelity.engine_check import UNUSABLE, unusable
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.output.lock import Product, Selection
from planish.optimizer.output.sites import Rewritten, check_expectations
from planish.optimizer.pipeline.pipeline import Outcome, PassReport, Pipeline


@dataclass(frozen=True)
class Candidate:
    """The components of an engine after the passes of one recipe."""

    tried: str
    """The passes that were tried behind the main pipeline, or instead of some of it; empty for the main pipeline."""
    parts: Mapping[str, Transformed]

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """Graphs and reports by component."""
        return {name: part.outcome for name, part in self.parts.items()}

    @property
    def applied(self) -> dict[str, tuple[Pass, ...]]:
        """The passes that were kept, by component."""
        return {name: outcome.applied.passes for name, outcome in self.outcomes.items()}

    @property
    def reports(self) -> list[PassReport]:
        """Reports of all components, one after the other."""
        return [report for part in self.parts.values() for report in part.outcome.reports]

    def reports_beyond(self, other: Candidate) -> list[PassReport]:
        """Reports of passes that are not the beginning of ``other`` as well."""
        beyond: list[PassReport] = []
        for name, part in self.parts.items():
            pairs = itertools.zip_longest(part.outcome.reports, other.parts[name].outcome.reports)
            alike = itertools.takewhile(lambda pair: None not in pair and pair[0].text == pair[1].text, pairs)
            beyond += part.outcome.reports[sum(1 for _ in alike) :]
        return beyond

    def changed_more_than(self, other: Candidate) -> bool:
        """True if passes that are not those of ``other`` changed a component."""
        # What stands behind them in both is no passes of its own, though it works on another graph.
        known = {report.text for report in other.reports}
        beyond = [report for report in self.reports_beyond(other) if report.text not in known]
        return any(report.modified and not report.rolled_back for report in beyond)


@dataclass(frozen=True)
class Emitted:
    """A candidate as an engine folder, and its verdict."""

    candidate: Candidate
    target: Backend
    """The target in the arithmetic that the engine computes in."""
    place: Path
    verdict: Verdict

    @property
    def tried(self) -> str:
        """The passes that were tried, which tell the candidates of a target apart."""
        return self.candidate.tried

    def obstacle(self, main: Emitted) -> str | None:
        """The reason why it cannot win against the main pipeline, known before anything is timed; None if it can."""
        reports = self.candidate.reports_beyond(main.candidate)
        rolled_back = next((report.rolled_back for report in reports if report.rolled_back is not None), None)
        if rolled_back is not None:
            return f"undone: {rolled_back}"
        if not self.candidate.changed_more_than(main.candidate):
            refused = next((refusal.reason for report in reports for refusal in report.refusals), "no place for it")
            return f"changed nothing: {refused}"
        violations = self.verdict.violations
        return f"outside the budget: {violations[0]}" if violations else None


def make_candidates(
    job: Job, plain: PlainEngine, transformer: Transformer, locked: Selection | None, freedom: Freedom
) -> list[Emitted]:
    """Transform, emit and check: the main pipeline first, which stands in the output, then those that are tried."""
    target = plain.target
    # Only the first attempt counts: nobody knows before whether there will be another.
    stage = functools.partial(job.stages.stage, counts=freedom.share == 1)
    with stage(f"{target.name}: passes"):
        candidates = _transform(job, target, transformer, locked, freedom)
        firm = [expectation for expectation in job.expected if expectation.is_exact]
        check_expectations(firm, [Rewritten.of(target.name, candidate.outcomes) for candidate in candidates])
    main = candidates[0]
    changed = [n for n, candidate in enumerate(candidates) if n == 0 or candidate.changed_more_than(main)]
    places = {n: job.places.scratch / f"{target.name}-{n}" if n else job.places.engines / target.name for n in changed}
    with stage(f"{target.name}: emission"):
        for n, place in places.items():
            _emit(job, target, candidates[n], place)
    with stage(f"{target.name}: check"):
        emitted = {n: _check(job, plain, candidates[n], place, tried=n > 0) for n, place in places.items()}
    # A candidate that changed nothing is the main engine: it is neither emitted nor checked again.
    return [emitted.get(n) or replace(emitted[0], candidate=candidate) for n, candidate in enumerate(candidates)]


def emitted_at(job: Job, plain: PlainEngine, target: Backend, candidate: Candidate, place: Path) -> Emitted:
    """An engine folder that stands in ``place``, with its verdict in the arithmetic of ``target``."""
    return Emitted(candidate, target, place, judge(job, plain, target, place, candidate.applied))


def _emit(job: Job, target: Backend, candidate: Candidate, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)  # of an attempt that missed the budget
    emit(job, target, {name: outcome.model for name, outcome in candidate.outcomes.items()}, place)


def _check(job: Job, plain: PlainEngine, candidate: Candidate, place: Path, *, tried: bool) -> Emitted:
    """The engine in ``place`` in the arithmetic of the plain one; where it leaves its budget, or does not run, it is
    emitted again in the next. One that is only ``tried`` beside the main pipeline need not run."""
    for target, following in itertools.pairwise(plain.arithmetics):
        try:
            emitted = emitted_at(job, plain, target, candidate, place)
            if not emitted.verdict.violations:
                return emitted
        except UNUSABLE as error:
            job.stages.tell(f"{target} does not run: {error}")
        _emit(job, following, candidate, place)
    target = plain.arithmetics[-1]
    try:
        return emitted_at(job, plain, target, candidate, place)
    except UNUSABLE as error:
        if not tried:
            raise
        verdict = Verdict(budgets_of(job, target, candidate.applied), unusable(target, place, error))
        return Emitted(candidate, target, place, verdict)


def _transform(
    job: Job, target: Backend, transformer: Transformer, locked: Selection | None, freedom: Freedom
) -> list[Candidate]:
    """The candidate of the main pipeline; where engines are timed, also those of other recipes, and of all of them
    with the extra passes behind."""

    def say(what: str) -> None:
        job.stages.tell(f"{target.name}: {what}")

    def run_all(pipelines: Mapping[str, Pipeline], freedom: Freedom) -> dict[str, Transformed]:
        return {name: transformer.run(name, pipeline, freedom, say) for name, pipeline in pipelines.items()}

    components = job.program.components
    candidates = {"": run_all({name: _main_pipeline(job, target, name, locked) for name in components}, freedom)}
    if locked is not None or not job.may_time(target):
        return [Candidate(tried, parts) for tried, parts in candidates.items()]
    main = job.request.pipelines[target.name].passes
    for other in job.request.instead(target, writes=job.program.generates):
        tried = ",".join(str(step) for step in other.passes if step not in main)
        candidates[tried] = run_all(dict.fromkeys(components, other), freedom)
    extra = job.request.extras[target.name]
    for tried, parts in list(candidates.items()) if extra.passes else ():
        behind = f"{tried},{extra}" if tried else str(extra)
        candidates[behind] = {name: transformer.run_behind(name, part, extra) for name, part in parts.items()}
    return [Candidate(tried, parts) for tried, parts in candidates.items()]


def _main_pipeline(job: Job, target: Backend, component: str, locked: Selection | None) -> Pipeline:
    """The pipeline of the lock or of the request; empty for a preset whose gain cannot be measured."""
    unmeasured = job.checks is Checks.NONE or (job.checks is Checks.OFFLOAD and locked is None)
    if unmeasured and job.request.preset is not None:
        return Pipeline()
    return job.request.pipelines[target.name] if locked is None else Pipeline.parse(locked.pipelines[component])


def products_of(candidates: Sequence[Candidate], shipped: Candidate | None) -> list[Product]:
    """The MatMuls that quantization passes chose among in all candidates, and whether each is quantized in the engine
    that is shipped: none is if that is the plain lowering."""
    measured = {
        (name, part.recipe): part.losses
        for candidate in candidates
        for name, part in candidate.parts.items()
        if part.losses
    }
    products: list[Product] = []
    for (name, recipe), losses in measured.items():
        part = None if shipped is None else shipped.parts.get(name)
        outcome = part.outcome if part is not None and part.recipe == recipe else None
        products += [_product(name, decision) for decision in decisions(losses, outcome)]
    return products


def _product(component: str, decision: Decision) -> Product:
    loss = decision.loss
    return Product(
        component=component,
        text=decision.text,
        product=loss.product,
        location=loss.location,
        noise=loss.relative_mse,
        effect=loss.output_error,
        weights=loss.weights,
        rounded=decision.rounded,
    )
