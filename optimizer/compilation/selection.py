"""Selection: which engine of each component is shipped, by the budget first and then by the clock.

Everything here is computed from verdicts and timings; nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from planish.optimizer.compilation.candidates import Candidate, Emitted
from planish.optimizer.compilation.job import Checks
from planish.optimizer.compilation.verdicts import NOT_CHECKED, OFFLOADED
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.recipe import When
from planish.optimizer.ir.graph import io_signature
from planish.optimizer.ir.program import Program
from planish.optimizer.output.lock import LockedPass, Selection, Speed, Trial
from planish.optimizer.pipeline.pipeline import Pipeline
from planish.optimizer.pipeline.presets import recipes
from planish.optimizer.system.machine import instruction_set
from planish.optimizer.timing.interleaved import Timing

Timed = Mapping[str, Mapping[str, Timing]]
"""Component -> shape -> timing, the speed-up over the plain lowering in it."""


def eligible(candidates: Sequence[Emitted]) -> list[Emitted]:
    """The candidates that keep their budgets and that, behind the main one, did something."""
    main = candidates[0]
    kept = [main] if not main.verdict.violations else []
    return kept + [tried for tried in candidates[1:] if tried.obstacle(main) is None]


def select_untimed(
    target: Backend, main: Emitted, checks: Checks, *, preset: bool, within_budget: bool
) -> Selection | None:
    """The selection where the clock has no say: nothing keeps its budget, or nothing can be timed; None elsewhere.

    Without the original, or with its weights in files, a preset ships the plain lowering and a pipeline what was asked
    for.
    """
    candidate, violations = main.candidate, main.verdict.violations
    if checks is not Checks.NONE and not within_budget:
        return untimed_selection(target, candidate, "plain", f"outside the budget: {violations[0]}")
    shipped: Literal["optimized", "plain"] = "plain" if preset else "optimized"
    if checks is Checks.NONE:
        return untimed_selection(target, candidate, shipped, f"{NOT_CHECKED}, and not measured")
    if checks is Checks.OFFLOAD:
        optimized = any(outcome.applied.passes for outcome in candidate.outcomes.values())
        passes = ", passes not compared one by one" if optimized else ""
        return untimed_selection(target, candidate, shipped, f"not measured{passes}: {OFFLOADED}")
    missing = target.missing()
    if missing is not None:
        return untimed_selection(target, candidate, "optimized", f"not measured: {missing}")
    return None


@dataclass(frozen=True)
class Ranking:
    """The fastest candidate for each component, as far as it beats the plain lowering."""

    winners: Mapping[str, Emitted]
    """By component; components that are missing stay plain."""
    timed: Timed
    """Timings of the fastest candidate of each component, those that do not win included."""


def rank(program: Program, target: Backend, candidates: Sequence[Emitted], timings: Sequence[Timed]) -> Ranking:
    """Compare candidates by their timings, in the same order; ``target`` is that of the plain engine.

    Components may come from different candidates as long as their inputs and outputs are those of the plain lowering,
    and their arithmetic is that of the plain engine.
    """
    plain = {name: io_signature(model) for name, model in program.components.items()}
    signatures = [
        {name: io_signature(outcome.model) for name, outcome in emitted.candidate.outcomes.items()}
        for emitted in candidates
    ]
    alike = [
        signature == plain and emitted.target == target
        for signature, emitted in zip(signatures, candidates, strict=True)
    ]
    errors = [emitted.verdict.error for emitted in candidates]
    fastest_index = fastest_of_each(timings, errors, apart=all(alike))
    timed = {name: timings[index][name] for name, index in fastest_index.items()}
    apart = all(alike[index] for index in fastest_index.values())
    won = faster(timed, apart=apart)
    return Ranking({name: candidates[index] for name, index in fastest_index.items() if name in won}, timed)


def timed_selection(
    target: Backend,
    engine: Candidate,
    ranking: Ranking,
    candidates: Sequence[Emitted],
    timings: Mapping[str, Timed],
) -> Selection:
    """The selection that a ranking leads to; ``timings`` are those of the eligible candidates, by what they tried."""
    trials = [
        trial(
            emitted.tried,
            emitted.obstacle(candidates[0]),
            [name for name, winner in ranking.winners.items() if winner.tried == emitted.tried],
            list(ranking.winners),
            timings.get(emitted.tried, {}),
        )
        for emitted in candidates
        if emitted.tried
    ]
    why = reason(list(ranking.timed), list(ranking.winners))
    selection = untimed_selection(target, engine, "optimized" if ranking.winners else "plain", why)
    return selection.model_copy(update={"measured": speeds(ranking.timed), "tried": trials})


def untried(target: Backend, preset: str, main: Pipeline) -> list[Trial]:
    """The recipes of a preset that only calibration data let into the race, and the reason for each."""
    known = {str(step) for step in main.passes}
    found = [
        recipe for when in (When.CALIBRATED, When.MAIN_CALIBRATED) for recipe in recipes(preset, target.name, when)
    ]
    return [
        Trial(
            passes=",".join(step for step in recipe.passes if step not in known),
            kept=False,
            raced=False,
            why=f"it needs --calibration: {recipe.why}",
        )
        for recipe in found
    ]


def untimed_selection(
    target: Backend, candidate: Candidate, shipped: Literal["optimized", "plain"], why: str
) -> Selection:
    """A selection for which nothing was timed."""
    return Selection(
        target=str(target),
        pipelines={name: str(outcome.applied) for name, outcome in candidate.outcomes.items()},
        rolled_back=[
            LockedPass(component=name, text=report.text, reason=report.rolled_back)
            for name, outcome in candidate.outcomes.items()
            for report in outcome.reports
            if report.rolled_back is not None
        ],
        shipped=shipped,
        why=why,
        machine=instruction_set(),
        measured=[],
    )


def without_changes(selection: Selection) -> Selection:
    """The selection of an engine that no pass changed: an equal engine is not faster, whatever the clock says."""
    why = "no pass changed anything"
    if not selection.measured:
        return selection.model_copy(update={"why": f"{selection.why}; {why}"})
    return selection.model_copy(update={"shipped": "plain", "why": why})


def fastest(engines: Sequence[Mapping[str, Timing]], errors: Sequence[float]) -> int:
    """The most faithful of the engines whose intervals, over all shapes together, overlap with that of the fastest.

    Those that are surely faster than the plain lowering come before others; of equal ones, the first.
    """
    sure = [index for index, timings in enumerate(engines) if is_faster(timings)] or list(range(len(engines)))
    best = max(sure, key=lambda index: _speedup(engines[index]))
    alike = [index for index in sure if _high(engines[index]) >= _low(engines[best])]
    return min(alike, key=lambda index: errors[index])


def fastest_of_each(engines: Sequence[Timed], errors: Sequence[float], *, apart: bool) -> dict[str, int]:
    """Component -> the engine to take it from; unless they may be taken ``apart``, all are of one."""
    if apart:
        return {name: fastest([own[name] for own in engines], errors) for name in engines[0]}
    return dict.fromkeys(engines[0], fastest([_labelled(own) for own in engines], errors))


def faster(timed: Timed, *, apart: bool) -> list[str]:
    """The components that are faster than in the plain lowering; unless they may be taken ``apart``, all or none."""
    if apart:
        return [name for name, timings in timed.items() if is_faster(timings)]
    return list(timed) if is_faster(_labelled(timed)) else []


def is_faster(timings: Mapping[str, Timing]) -> bool:
    """True if an engine is measurably faster than the plain lowering, over all shapes together."""
    return _low(timings) > 1


def _speedup(timings: Mapping[str, Timing]) -> float:
    """The product of all speed-ups."""
    return math.prod(timing.speedup for timing in timings.values())


def _low(timings: Mapping[str, Timing]) -> float:
    """The lower end of the interval of the product of all speed-ups.

    Shapes are timed one after the other, so their errors are independent: the squares of their logarithms add up.
    """
    errors = [math.log(timing.speedup / timing.low) for timing in timings.values()]
    return _speedup(timings) / math.exp(math.hypot(*errors))


def _high(timings: Mapping[str, Timing]) -> float:
    """The upper end of that interval."""
    errors = [math.log(timing.high / timing.speedup) for timing in timings.values()]
    return _speedup(timings) * math.exp(math.hypot(*errors))


def reason(components: Sequence[str], won: Sequence[str]) -> str:
    """The reason for shipping an engine whose components ``won`` are faster than the plain lowering."""
    if not won:
        return "not measurably faster than the plain lowering"
    plain = [name for name in components if name not in won]
    return "faster than the plain lowering" + (f"; left plain: {', '.join(plain)}" if plain else "")


def trial(passes: str, obstacle: str | None, kept: Sequence[str], won: Sequence[str], timed: Timed) -> Trial:
    """The record of passes that were tried: ``kept`` are the components of ``won`` that have them."""
    if obstacle is not None:
        return Trial(passes=passes, kept=False, why=obstacle)
    why = "faster than without" if kept else "not measurably faster than without"
    why += f", in {', '.join(kept)}" if kept and len(kept) < len(won) else ""
    return Trial(passes=passes, kept=bool(kept), why=why, measured=speeds(timed))


def speeds(timed: Timed) -> list[Speed]:
    """Speed-ups as the lock keeps them; where there are several components, the shape follows the component."""
    return [
        Speed(shape=label, speedup=_short(found.speedup), low=_short(found.low), high=_short(found.high))
        for label, found in _labelled(timed).items()
    ]


def side_by_side(plain: Timed, optimized: Timed) -> dict[str, dict[str, Timing]]:
    """Shape -> the timings of both."""
    other = _labelled(optimized)
    return {label: {"plain": timing, "optimized": other[label]} for label, timing in _labelled(plain).items()}


_DISTURBED = 0.1
"""Share of the processors that others use, and of turns that are outliers, from which a note tells of it."""


def disturbances(target: Backend, timed: Mapping[str, Mapping[str, Timing]]) -> list[str]:
    """Notes on what disturbed the timings of an engine."""
    measured = [timing for timings in timed.values() for timing in timings.values()]
    busy, outliers = (max(getattr(one, what) for one in measured) for what in ("busy", "outliers"))
    notes = {
        f"other processes used {busy:.0%} of the processors": busy,
        f"{outliers:.0%} of the turns took half as long again as the median": outliers,
    }
    told = [text for text, share in notes.items() if share > _DISTURBED]
    advice = "intervals are wider for it, and small gains are not found"
    return [f"while {target.name} was timed, {' and '.join(told)}: {advice}"] if told else []


def _labelled(timed: Timed) -> dict[str, Timing]:
    return {
        shape if len(timed) == 1 else f"{component} {shape}": timing
        for component, timings in timed.items()
        for shape, timing in timings.items()
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
