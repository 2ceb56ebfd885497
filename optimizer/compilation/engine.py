"""One engine of one target: candidates, their verdicts, the selection, and what is shipped in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planish.optimizer.compilation import selection
from planish.optimizer.compilation.arithmetic import arithmetics_of, plain_engine
from planish.optimizer.compilation.candidates import (
    Candidate,
    Emitted,
    emitted_at,
    make_candidates,
    products_of,
)
from planish.optimizer.compilation.emission import PlainEngine, emit, replace_folder, same_files
from planish.optimizer.compilation.job import Checks, Job
from planish.optimizer.compilation.progress import count_stages
from planish.optimizer.compilation.selection import Timed
from planish.optimizer.compilation.transform import Freedom, Transformer, untouched
from planish.optimizer.compilation.verdicts import Verdict, judge, judge_as_loaders_open
from planish.optimizer.errors import CheckFailed
from planish.optimizer.fidelity.engine_check import Fidelity
from planish.optimizer.fidelity.inputs import default_shapes, sized_case
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.ir.graph import operators_of
from planish.optimizer.output.lock import Selection
from planish.optimizer.output.sites import Rewritten, check_expectations, summed
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import Timing
from planish.optimizer.timing.tuning_table import Profile, host_of

STRICTER = (0.5, 0.25, 0.1)
"""Shares of the error allowed that quantization may spend when an engine strays further than its graph did."""


@dataclass(frozen=True)
class BuiltEngine:
    """A finished engine folder and all that is known about it."""

    target: Backend
    """In the arithmetic that the engine computes in."""
    candidate: Candidate
    """The passes of the shipped engine; of the one that was rejected, if that is the plain lowering."""
    selection: Selection
    verdict: Verdict
    timings: Mapping[str, Mapping[str, Timing]]
    """By shape: `plain` and `optimized`; empty if nothing was timed."""
    rewritten: Rewritten
    as_loaders_open: Fidelity | None
    """The fidelity of the engine as loaders open it that are given no options, where that differs."""
    tunings: Mapping[str, Any]
    """Answers of the tuning table that were asked for, by host."""
    notes: tuple[str, ...]
    """Notes for the user."""

    @property
    def calibrated(self) -> bool:
        """True if passes of the shipped engine used statistics of activations."""
        return self.selection.shipped == "optimized" and any(part.calibrated for part in self.candidate.parts.values())


@dataclass(frozen=True)
class Selected:
    """The engine that is selected among the candidates, where it stands for now, and its timings."""

    engine: Emitted
    selection: Selection
    timings: Mapping[str, Mapping[str, Timing]]
    notes: tuple[str, ...] = ()


def build_engine(job: Job, target: Backend, transformer: Transformer, locked: Selection | None) -> BuiltEngine:
    """Build the engine of one target; ``locked`` is the selection of a lock, if there is one."""
    begun = job.stages.done
    plain = plain_engine(job, arithmetics_of(job, target, locked))
    profile, profile_notes = _profile_of(job, plain.target, locked)
    candidates, attempt_notes = _candidates(job, plain, transformer, locked, profile)
    selected = _select(job, plain, candidates, locked)
    engine = _ship(job, plain, selected)
    job.stages.done = begun + count_stages(may_measure=locked is None and job.checks is Checks.FULL)
    chosen, rewritten = selected.selection, Rewritten.of(target.name, engine.candidate.outcomes)
    check_expectations(job.expected, [rewritten])
    optimized = chosen.shipped == "optimized"
    if not chosen.products:
        products = products_of([emitted.candidate for emitted in candidates], engine.candidate if optimized else None)
        chosen = chosen.model_copy(update={"products": products})
    if not optimized:
        rewritten = replace(rewritten, shipped=summed(map(operators_of, job.program.components.values())))
    if locked is None and job.request.preset is not None and not job.data and job.may_time(target):
        missed = selection.untried(target, job.request.preset, job.request.pipelines[target.name])
        chosen = chosen.model_copy(update={"tried": [*chosen.tried, *missed]})
    opened_as = None if engine.target == target else str(engine.target)
    chosen = chosen.model_copy(update={"target": str(target), "opened_as": opened_as})
    rolled_back = [note for emitted in candidates for part in emitted.candidate.parts.values() for note in part.notes]
    return BuiltEngine(
        target=engine.target,
        candidate=engine.candidate,
        selection=chosen,
        verdict=engine.verdict,
        timings=selected.timings,
        rewritten=rewritten,
        as_loaders_open=judge_as_loaders_open(job, engine.target, engine.place),
        tunings={} if profile is None else {host_of(profile.target): profile.described()},
        notes=(*profile_notes, *attempt_notes, *dict.fromkeys(rolled_back), *selected.notes),
    )


def _profile_of(job: Job, target: Backend, locked: Selection | None) -> tuple[Profile | None, list[str]]:
    """The tuning table of the target, or a note that it is not used."""
    if job.request.profile is None:
        return None, []
    if locked is None and job.may_time(target):
        return Profile(target, job.request.profile), []
    why = "the lock has decided" if locked is not None else "nothing is measured"
    return None, [f"the profile was not asked about {target.name}: {why}"]


def _candidates(
    job: Job, plain: PlainEngine, transformer: Transformer, locked: Selection | None, profile: Profile | None
) -> tuple[list[Emitted], list[str]]:
    """The candidates, and notes on attempts before: free quantization is held to less error until one keeps its budget.

    CheckFailed if what `--expect` names is missing, or if a pipeline or a lock leaves the budget.
    """
    freedom = Freedom(free=job.request.preset is not None and locked is None, profile=profile)
    candidates, notes = make_candidates(job, plain, transformer, locked, freedom), []
    for share in STRICTER if freedom.free else ():
        kept = any(not emitted.verdict.violations for emitted in candidates)
        if kept or not products_of([emitted.candidate for emitted in candidates], None):
            break
        notes.append(f"{plain.target.name} strayed too far: rounding is held to {share:g} of the error allowed")
        candidates = make_candidates(job, plain, transformer, locked, replace(freedom, share=share))
    check_expectations(
        job.expected, [Rewritten.of(plain.target.name, emitted.candidate.outcomes) for emitted in candidates]
    )
    violations = candidates[0].verdict.violations
    if violations and job.request.preset is None:
        advice = "choose other passes or a wider budget"
        raise CheckFailed("; ".join(violations), where=f"target {plain.target}", advice=advice)
    if violations and locked is not None and locked.shipped == "optimized":
        advice = "the lock does not hold here: remove it"
        raise CheckFailed("; ".join(violations), where=f"target {plain.target}", advice=advice)
    return candidates, notes


def _select(job: Job, plain: PlainEngine, candidates: Sequence[Emitted], locked: Selection | None) -> Selected:
    """Select by the lock, else by the budget, else by the clock."""
    if locked is not None:
        return Selected(candidates[0], locked, {})
    selected = _select_anew(job, plain, candidates)
    reports = selected.engine.candidate.reports
    if not reports or any(report.modified for report in reports):
        return selected
    note = f"no pass changed anything for {plain.target.name}: planish explain OUT tells why of each"
    unchanged = selection.without_changes(selected.selection)
    return replace(selected, selection=unchanged, notes=(note, *selected.notes))


def _select_anew(job: Job, plain: PlainEngine, candidates: Sequence[Emitted]) -> Selected:
    target, main = plain.target, candidates[0]
    eligible = selection.eligible(candidates)
    untimed = selection.select_untimed(
        target, main, job.checks, preset=job.request.preset is not None, within_budget=bool(eligible)
    )
    if untimed is not None:
        return Selected(main, untimed, {})
    with job.stages.stage(f"{target.name}: measurement"):
        eligible = _unlike(plain.place, eligible)
        folders = [(plain.target, plain.place), *((emitted.target, emitted.place) for emitted in eligible)]
        plain_timings, *timings = _time(job, folders) if eligible else [{}]
    if not eligible:
        why = "the same files as the plain lowering"
        return Selected(main, selection.untimed_selection(target, main.candidate, "plain", why), {})
    ranking = selection.rank(job.program, plain.target, eligible, timings)
    engine = _join(job, plain, ranking.winners) if ranking.winners else eligible[0]
    violations = engine.verdict.violations
    if violations:  # components that keep their budgets apart may leave that of the continuations together
        why = f"outside the budget: {violations[0]}"
        return Selected(engine, selection.untimed_selection(target, engine.candidate, "plain", why), {})
    tried = {emitted.tried: timed for emitted, timed in zip(eligible, timings, strict=True)}
    chosen = selection.timed_selection(target, engine.candidate, ranking, candidates, tried)
    timed = selection.side_by_side(plain_timings, ranking.timed)
    return Selected(engine, chosen, timed, tuple(selection.disturbances(target, timed)))


def _unlike(plain: Path, engines: Sequence[Emitted]) -> list[Emitted]:
    """The engines whose files are neither those of the plain lowering nor those of an engine before them."""
    kept: list[Emitted] = []
    for emitted in engines:
        if not any(same_files(place, emitted.place) for place in [plain, *(other.place for other in kept)]):
            kept.append(emitted)
    return kept


def _time(job: Job, folders: Sequence[tuple[Backend, Path]]) -> list[Timed]:
    """Timings of every engine folder: each component at each shape, the first folder as the baseline."""
    timings: list[dict[str, dict[str, Timing]]] = [{name: {} for name in job.program.signatures} for _ in folders]
    for component, signature in job.program.signatures.items():
        engines = [EngineRef(str(target), target.path_of(component, folder)) for target, folder in folders]
        for sizes in job.request.shapes or default_shapes(signature):
            case, shape = sized_case(signature, sizes)
            if shape not in timings[0][component]:
                for by_component, timing in zip(timings, job.clock(engines, [case] * len(engines)), strict=True):
                    by_component[component][shape] = timing
    return list(timings)


def _join(job: Job, plain: PlainEngine, winners: Mapping[str, Emitted]) -> Emitted:
    """The engine whose components are the winners, and plain for the rest."""
    first = next(iter(winners.values()))
    components = job.program.components
    if winners.keys() == components.keys() and {winner.tried for winner in winners.values()} == {first.tried}:
        return first
    parts = {
        name: winners[name].candidate.parts[name] if name in winners else untouched(model)
        for name, model in components.items()
    }
    place = job.places.scratch / f"{plain.target.name}-joined"
    emit(job, first.target, {name: part.outcome.model for name, part in parts.items()}, place)
    return emitted_at(job, plain, first.target, Candidate("", parts), place)


def _ship(job: Job, plain: PlainEngine, selected: Selected) -> Emitted:
    """Put the selected engine into the output; CheckFailed if that is the plain lowering and it leaves the budget."""
    engine, place = selected.engine, job.places.engines / plain.target.name
    applied = any(outcome.applied.passes for outcome in engine.candidate.outcomes.values())
    if selected.selection.shipped == "plain" and applied:
        replace_folder(plain.place, place)
        verdict = judge(job, plain, plain.target, place, dict.fromkeys(engine.candidate.outcomes, ()))
        if verdict.violations:
            raise CheckFailed("; ".join(verdict.violations), where=f"the plain lowering for {plain.target}")
        return Emitted(engine.candidate, plain.target, place, verdict)
    if engine.place != place:
        replace_folder(engine.place, place)
    return replace(engine, place=place)
