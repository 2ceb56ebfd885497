"""One engine: pipeline, emission, check, and the choice whether it is shipped."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.calibration.sensitivity import SelectMatMuls, tightened
from planish.optimizer.compilation import selection
from planish.optimizer.compilation.autotune import Tune
from planish.optimizer.compilation.candidates import (
    EVALUATION,
    NOT_CHECKED,
    OFFLOADED,
    Candidate,
    replace_folder,
    unmeasured_choice,
    went_on,
)
from planish.optimizer.compilation.progress import Stages, count_stages
from planish.optimizer.compilation.request import Request
from planish.optimizer.errors import CheckFailed
from planish.optimizer.fidelity.budget import Budget, Clause, metrics_of
from planish.optimizer.fidelity.engine_check import (
    GENERATION,
    Fidelity,
    check_as_loaders_open,
    check_engines,
    demand_room,
)
from planish.optimizer.fidelity.inputs import default_shapes, known_sizes, quick, sized_case
from planish.optimizer.fidelity.metrics import CONTINUED, JUDGED, Comparison
from planish.optimizer.fidelity.reference import References
from planish.optimizer.fidelity.user_metric import Evaluation, scored
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.graph import io_signature, operators_of
from planish.optimizer.ir.program import Arrays
from planish.optimizer.lowering import Lowered
from planish.optimizer.output.lock import Product, Selection
from planish.optimizer.output.sites import Expectation, Rewritten, check_expectations, summed
from planish.optimizer.pipeline import instruments
from planish.optimizer.pipeline.instruments import Instrument
from planish.optimizer.pipeline.pipeline import Outcome, Pipeline
from planish.optimizer.runtime.interpreter import CHECKER, load_mapped
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import Timing, time_against_first
from planish.optimizer.timing.tuning_table import Profile

_STRICTER = (0.5, 0.25, 0.1)
"""Shares of the error allowed that are tried when an engine strays further than its graph did."""
_SAME_TOKENS = (Clause("kl", "<=", 1e-6), Clause("greedy", ">=", 1.0))
"""What continuations of an exact engine must keep."""


@dataclass
class BuiltEngine:
    """A finished engine folder and all that is known about it."""

    target: Backend
    outcomes: Mapping[str, Outcome]
    """What the pipeline did, by component."""
    choice: Selection
    budgets: Mapping[str, Budget]
    """By component."""
    fidelity: Fidelity
    timings: Mapping[str, Mapping[str, Timing]]
    """Per shape: `plain` and `optimized`; empty if nothing was measured."""
    rewritten: Rewritten
    as_loaders_open: Fidelity | None = None
    """Of the engine as loaders open it that are given no options, where that differs."""


@dataclass
class Builder:
    """Builds engines of one lowered source."""

    request: Request
    lowered: Lowered
    references: Callable[[], References] | None
    inputs: Mapping[str, Sequence[Arrays]]
    """The reference inputs by component; the outputs may still be on their way."""
    batches: Mapping[str, Callable[[], Iterable[Arrays]]]
    """What passes see activations on, by component."""
    folder: Path
    """Where the engines' folders are made."""
    scratch: Path
    reproducers: Path
    stages: Stages
    offload: bool = False
    """Weights stay in their files: single passes are not compared, engines are opened `mapped`, nothing is timed."""
    expected: Sequence[Expectation] = ()
    """How often passes must fire and operators be there, whatever is shipped."""
    notes: list[str] = field(default_factory=list)
    """What the user should read after the build."""
    profiles: dict[str, Profile] = field(default_factory=dict)
    """What was asked about each target."""
    selections: dict[tuple[str, str, str], SelectMatMuls] = field(default_factory=dict)
    """What rounding each product would cost, by target, component and pipeline."""
    beginnings: dict[str, Outcome] = field(default_factory=dict)
    """What came of the passes that all pipelines begin with, by component."""
    observed: list[Outcome] = field(default_factory=list)
    """What came of pipelines whose passes saw activations."""
    plain_scores: dict[str, float] = field(default_factory=dict)
    """The user's own measure of the plain lowering, by target."""

    def calibrated(self, built: Sequence[BuiltEngine]) -> bool:
        """Whether passes saw activations that are in one of these engines."""
        shipped = [engine for engine in built if engine.choice.shipped == "optimized"]
        return any(one is own for engine in shipped for one in engine.outcomes.values() for own in self.observed)

    def build(self, target: Backend, choice: Selection | None) -> BuiltEngine:
        """Build the engine of one target; ``choice`` says what to do if it was decided before."""
        place = self.folder / target.name
        unlocked = choice is None and self.references is not None and not self.offload
        begun = self.stages.done
        if self.request.profile is not None and (choice is not None or self._unmeasured(target)):
            why = "the lock has decided" if choice is not None else "nothing is measured"
            self.notes.append(f"the profile was not asked about {target.name}: {why}")
        contenders = self._contenders(target, choice, place)
        for share in _STRICTER if choice is None and self.request.preset is not None else ():
            if any(not one.violations for one in contenders) or not self._products(target, None):
                break
            self.notes.append(f"{target.name} strayed too far: rounding is held to {share:g} of the error allowed")
            contenders = self._contenders(target, choice, place, share)
        first = contenders[0]
        check_expectations(self.expected, [Rewritten.of(target.name, one.outcomes) for one in contenders])
        if first.violations and self.request.preset is None:
            raise CheckFailed(
                "; ".join(first.violations), where=f"target {target}", advice="choose other passes or a wider budget"
            )
        timings: Mapping[str, Mapping[str, Timing]] = {}
        best = first
        if choice is None:
            best, choice, timings = self._choose(target, contenders)
            reports = [report for outcome in best.outcomes.values() for report in outcome.reports]
            if reports and not any(report.modified for report in reports):
                choice = self._unchanged(target, choice)
        elif first.violations and choice.shipped == "optimized":
            raise CheckFailed(
                "; ".join(first.violations), where=f"target {target}", advice="the lock does not hold here: remove it"
            )
        if choice.shipped == "plain" and any(outcome.applied.passes for outcome in best.outcomes.values()):
            best = self._plain_instead(target, best, place)
        elif best.place != place:
            replace_folder(best.place, place)
        if not choice.products:
            made = best if choice.shipped == "optimized" else None
            choice = choice.model_copy(update={"products": self._products(target, made)})
        self.stages.done = begun + count_stages(may_measure=unlocked)  # a measurement may have been needless
        rewritten = Rewritten.of(target.name, best.outcomes)
        check_expectations(self.expected, [rewritten])
        if choice.shipped == "plain":
            plain = summed(map(operators_of, self.lowered.program.components.values()))
            rewritten = replace(rewritten, shipped=plain)
        opened = self._as_loaders_open(target, place)
        return BuiltEngine(target, best.outcomes, choice, best.budgets, best.fidelity, timings, rewritten, opened)

    def _as_loaders_open(self, target: Backend, place: Path) -> Fidelity | None:
        """How the shipped engine compares when a loader opens it with options of its own, which may be other ones."""
        default = None if self.references is None or self.offload else target.as_loaders_open()
        if default is None or self.references is None:
            return None
        with self.stages.stage(f"{target.name}: check as loaders open it", counts=False):
            return check_as_loaders_open(default, place, self.lowered.program.signatures, self.references())

    def _unchanged(self, target: Backend, choice: Selection) -> Selection:
        """The choice of an engine that no pass changed: an equal engine is not faster, whatever the clock said."""
        self.notes.append(f"no pass changed anything for {target.name}: planish explain OUT tells why of each")
        why = "no pass changed anything"
        if not choice.measured:
            return choice.model_copy(update={"why": f"{choice.why}; {why}"})
        return choice.model_copy(update={"shipped": "plain", "why": why})

    def _contenders(self, target: Backend, choice: Selection | None, place: Path, share: float = 1) -> list[Candidate]:
        """The engine of the pipeline, in its place; behind it those of other pipelines, and with the extra passes
        behind each, if they are to be tried.

        ``share`` of the error that is allowed may be spent on rounding.
        """
        # Only the first attempt counts: nobody knows before whether there will be another.
        stage = functools.partial(self.stages.stage, counts=share == 1)
        with stage(f"{target.name}: passes"):
            ways = {"": self._run_all(target, choice, share)}
            trying = choice is None and not self._unmeasured(target)
            main = self.request.pipelines[target.name].passes
            writes = self.lowered.program.generates
            for other in self.request.instead(target, writes=writes) if trying else ():
                instead = ",".join(str(step) for step in other.passes if step not in main)
                ways[instead] = self._run_all(target, None, share, other)
            extra = self.request.extra
            for text, done in list(ways.items()) if trying and extra.passes else ():
                behind = f"{text},{extra}" if text else str(extra)
                ways[behind] = {name: self._run_further(name, outcome, extra) for name, outcome in done.items()}
            firm = [expectation for expectation in self.expected if expectation.is_exact]
            check_expectations(firm, [Rewritten.of(target.name, outcomes) for outcomes in ways.values()])
            changed = {text: outcomes for text, outcomes in ways.items() if not text or went_on(outcomes, ways[""])}
        places = {text: self.scratch / f"{target.name}-{n}" if n else place for n, text in enumerate(ways)}
        with stage(f"{target.name}: emission"):
            for text, outcomes in changed.items():
                shutil.rmtree(places[text], ignore_errors=True)  # of an attempt that missed the budget
                self._emit(target, {name: outcome.model for name, outcome in outcomes.items()}, places[text])
        with stage(f"{target.name}: check"):
            found = {text: self._contender(target, outcomes, text, places[text]) for text, outcomes in changed.items()}
        return [found.get(text) or replace(found[""], outcomes=outcomes, tried=text) for text, outcomes in ways.items()]

    def _contender(self, target: Backend, outcomes: Mapping[str, Outcome], tried: str, place: Path) -> Candidate:
        budgets = self._budgets(target, {name: outcome.applied.passes for name, outcome in outcomes.items()})
        return Candidate(outcomes, tried, place, budgets, self._check(target, place))

    def _unmeasured(self, target: Backend) -> bool:
        """Whether nothing can be timed."""
        return self.references is None or self.offload or target.missing() is not None

    def _run_all(
        self, target: Backend, choice: Selection | None, share: float, instead: Pipeline | None = None
    ) -> dict[str, Outcome]:
        """Run the pipeline, or another instead of it, over a copy of each component."""
        names = self.lowered.program.components
        pipelines = {name: instead or self._pipeline(target, name, choice) for name in names}
        return {name: self._run_passes(target, name, pipelines[name], choice, share) for name in names}

    def _run_passes(
        self, target: Backend, component: str, pipeline: Pipeline, choice: Selection | None, share: float
    ) -> Outcome:
        """Run a pipeline over a copy of a component; presets undo passes that leave the budget, locks never do."""
        undo = self.request.preset is not None and choice is None
        begun, rest = self._begun(component, pipeline, undo=undo)
        observe = self._observing(target, component)
        first: list[Instrument] = [*(self._tuning(target, component) if undo else []), observe]
        first += self._selecting(target, component, pipeline, share) if undo else []
        ended = self._run(component, begun.model, rest, undo=undo, first=first)
        outcome = Outcome(ended.model, [*begun.reports, *ended.reports])
        for select in (watcher for watcher in first if isinstance(watcher, SelectMatMuls)):
            select.outcomes.append(outcome)
        self.observed += [outcome] if observe.asked else []
        return outcome

    def _begun(self, component: str, pipeline: Pipeline, *, undo: bool) -> tuple[Outcome, Pipeline]:
        """A copy of what all pipelines begin with, which is run once, and what is left of this one."""
        shared, model = self.request.beginning, self.lowered.program.components[component]
        if not shared or pipeline.passes[: len(shared)] != shared:
            return Outcome(model.clone(), []), pipeline
        if component not in self.beginnings:
            self.beginnings[component] = self._run(component, model.clone(), Pipeline(shared), undo=undo)
        begun = self.beginnings[component]
        return Outcome(begun.model.clone(), begun.reports), Pipeline(pipeline.passes[len(shared) :])

    def _observing(self, target: Backend, component: str) -> Calibrate:
        """What lets passes see activations."""

        def say(what: str) -> None:
            self.stages.tell(f"{target.name}: {what}")

        unchecked = self.offload or self.references is None
        mapped = functools.partial(load_mapped, place=self.scratch / "observed")
        load = mapped if unchecked else registry.backend(CHECKER).load
        return Calibrate(self.lowered.program.signatures[component], self.batches[component], load, say)

    def _selecting(self, target: Backend, component: str, pipeline: Pipeline, share: float) -> list[Instrument]:
        """What decides which products are rounded, if the outputs have a budget and can be compared."""
        signature = self.lowered.program.signatures[component]
        steering = self.request.steering(signature)
        if self.references is None or self.offload or not steering.clauses:
            return []
        references, load = self.references, registry.backend(CHECKER).load
        budget = tightened(steering, share)
        select = SelectMatMuls(signature, lambda: references().components[component], budget, load)
        self.selections[target.name, component, str(pipeline)] = select
        return [select]

    def _products(self, target: Backend, engine: Candidate | None) -> list[Product]:
        """What quantizing passes chose among, in every component, and what is rounded in an engine (none: nothing)."""
        outcomes = {} if engine is None else engine.outcomes
        selected = [(part, one) for (name, part, _), one in self.selections.items() if name == target.name]
        return [selection.product(part, found) for part, one in selected for found in one.decisions(outcomes.get(part))]

    def _tuning(self, target: Backend, component: str) -> list[Instrument]:
        """What gives passes the options that the target runs fastest at the shapes asked for, if there is a profile."""
        if self.request.profile is None or self._unmeasured(target):
            return []
        profile = self.profiles.setdefault(target.name, Profile(target, self.request.profile))
        signature = self.lowered.program.signatures[component]
        shapes = self.request.shapes or default_shapes(signature)
        return [Tune(profile, [known_sizes(signature, sizes) for sizes in shapes])]

    def _run_further(self, component: str, outcome: Outcome, extra: Pipeline) -> Outcome:
        """Go on with a copy of what a pipeline made of a component."""
        found = self._run(component, outcome.model.clone(), extra, undo=True)
        further = Outcome(found.model, [*outcome.reports, *found.reports])
        for known in (self.observed, *(select.outcomes for select in self.selections.values())):
            if any(one is outcome for one in known):
                known.append(further)
        return further

    def _run(
        self, component: str, model: ir.Model, pipeline: Pipeline, *, undo: bool, first: Sequence[Instrument] = ()
    ) -> Outcome:
        reproducer = instruments.Reproducer(self.reproducers, onnx_io.save, bugs_only=undo)
        signature = self.lowered.program.signatures[component]
        budget_of = functools.partial(self._budget_of, component)
        load = registry.backend(CHECKER).load
        checks = (
            [instruments.CompareEach(signature, quick(self.inputs[component]), budget_of, load)]
            if self.references is not None and not self.offload
            else []
        )
        watchers = [*first, reproducer, *checks, instruments.VerifyEach(), instruments.MeasureCost()]
        outcome = pipeline.run(model, watchers, on_failure="rollback" if undo else "raise")
        self.notes += [f"an exact pass was undone, which is a bug; reproduce with: {c}" for c in reproducer.commands]
        return outcome

    def _pipeline(self, target: Backend, component: str, choice: Selection | None) -> Pipeline:
        """What was asked for or chosen; nothing for a preset whose gain cannot be measured."""
        unmeasured = self.references is None or (self.offload and choice is None)
        if unmeasured and self.request.preset is not None:
            return Pipeline()
        return self.request.pipelines[target.name] if choice is None else Pipeline.parse(choice.pipelines[component])

    def _budget_of(self, component: str, step: Pass) -> Budget:
        """What one pass may change: rounding if it is exact, else what was asked for."""
        if step.exact and self.references is not None:
            return self.references().components[component].exact_budget()
        return self.request.steering(self.lowered.program.signatures[component])

    def _budgets(self, target: Backend, passes: Mapping[str, Sequence[Pass]]) -> dict[str, Budget]:
        """What each component of an engine may differ from the reference, given the passes that made it.

        As long as all are exact, and the target is, or nothing was asked for, not a token of continuations may differ.
        """
        if self.references is None:
            return {}
        references = self.references()
        bent = target.rounds and bool(self.request.asked.clauses)
        exact = {name: not bent and all(step.exact for step in steps) for name, steps in passes.items()}
        asked = self.request.asked
        written = asked.only(CONTINUED) if references.continuations else Budget()
        judged = asked.only(JUDGED) if self.request.evaluation is not None else Budget()
        budgets = {}
        for name in passes:
            signature = self.lowered.program.signatures[name]
            whole = bool(written.clauses or judged.clauses)  # these hold of every component
            held = asked.only(metrics_of(signature)) if whole else self.request.steering(signature)
            noise = references.components[name].exact_budget().clauses if exact[name] else ()
            budgets[name] = Budget((*noise, *held.clauses))
        if references.continuations:
            budgets[GENERATION] = Budget((*(_SAME_TOKENS if all(exact.values()) else ()), *written.clauses))
        if self.request.evaluation is not None:
            budgets[EVALUATION] = judged
        return budgets

    def _emit(self, target: Backend, models: Mapping[str, ir.Model], place: Path) -> None:
        place.mkdir(parents=True)
        target.emit(replace(self.lowered.program, components=dict(models)), place)
        for name in self.lowered.companions:
            self._copy_companion(name, place)

    def _check(self, target: Backend, place: Path) -> Fidelity:
        """Run the engine on every reference input, in processes of its own."""
        if self.references is None:
            return Fidelity({}, NOT_CHECKED, 0)
        if self.offload:
            demand_room(target, sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))
        signatures = self.lowered.program.signatures
        found = check_engines(target, place, signatures, self.references(), mapped=self.offload)
        if self.request.evaluation is None:
            return found
        own = Comparison({"engine": self._scores(target, place, self.request.evaluation)})
        return replace(found, comparisons={**found.comparisons, EVALUATION: own})

    def _scores(self, target: Backend, place: Path, evaluation: Evaluation) -> Mapping[str, float]:
        """The user's own measure of an engine; of the plain one as well, once, if a budget compares with it."""
        score = evaluation.score(place)
        if not any(clause.metric == "score_ratio" for clause in self.request.asked.clauses):
            return scored(score, None)
        if target.name not in self.plain_scores:
            plain = self._plain(target)
            self.plain_scores[target.name] = evaluation.score(plain)
        return scored(score, self.plain_scores[target.name])

    def _choose(
        self, target: Backend, contenders: Sequence[Candidate]
    ) -> tuple[Candidate, Selection, Mapping[str, Mapping[str, Timing]]]:
        """Decide by the budget first, then by the clock, against the plain lowering on the same target."""
        first = contenders[0]
        sound = [first] if not first.violations else []
        sound += [tried for tried in contenders[1:] if tried.obstacle(first) is None]
        if self.references is not None and not sound:
            return first, unmeasured_choice(target, first, "plain", f"outside the budget: {first.violations[0]}"), {}
        if self.references is None or self.offload:
            choice = unmeasured_choice(target, first, "optimized", f"{NOT_CHECKED}, and not measured")
            if self.offload:
                passes = ", passes not compared one by one" if any(choice.pipelines.values()) else ""
                choice = choice.model_copy(update={"why": f"not measured{passes}: {OFFLOADED}"})
            shipped = "optimized" if self.request.preset is None else "plain"
            return first, choice.model_copy(update={"shipped": shipped}), {}
        missing = target.missing()
        if missing is not None:
            return first, unmeasured_choice(target, first, "optimized", f"not measured: {missing}"), {}
        return self._choose_by_clock(target, contenders, sound)

    def _choose_by_clock(
        self, target: Backend, contenders: Sequence[Candidate], sound: Sequence[Candidate]
    ) -> tuple[Candidate, Selection, Mapping[str, Mapping[str, Timing]]]:
        """The fastest of the sound contenders for each component; where none beats the plain lowering, that one."""
        with self.stages.stage(f"{target.name}: measurement"):
            plain, *others = self._measure(target, [contender.place for contender in sound])
        borders = [{name: io_signature(one.model) for name, one in each.outcomes.items()} for each in sound]
        old = {name: io_signature(model) for name, model in self.lowered.program.components.items()}
        best = selection.fastest_of_each(others, apart=all(border == old for border in borders))
        timed = {name: others[index][name] for name, index in best.items()}
        faster = selection.faster(timed, apart=all(borders[index] == old for index in best.values()))
        won = {name: sound[index] for name, index in best.items() if name in faster}
        engine = self._joined(target, won) if won else sound[0]
        if engine.violations:
            return engine, unmeasured_choice(target, engine, "plain", f"outside the budget: {engine.violations[0]}"), {}
        by_tried = {contender.tried: own for contender, own in zip(sound, others, strict=True)}
        trials = [
            selection.trial(
                one.tried,
                one.obstacle(contenders[0]),
                [name for name, winner in won.items() if winner is one],
                list(won),
                by_tried.get(one.tried, {}),
            )
            for one in contenders
            if one.tried
        ]
        choice = unmeasured_choice(
            target, engine, "optimized" if won else "plain", selection.reason(list(plain), list(won))
        )
        choice = choice.model_copy(update={"measured": selection.speeds(timed), "tried": trials})
        return engine, choice, selection.side_by_side(plain, timed)

    def _joined(self, target: Backend, won: Mapping[str, Candidate]) -> Candidate:
        """The engine whose components are those that won, and plain ones for the rest."""
        components = self.lowered.program.components
        first = next(iter(won.values()))
        if all(won.get(name) is first for name in components):
            return first
        outcomes = {
            name: won[name].outcomes[name] if name in won else Outcome(model.clone(), [])
            for name, model in components.items()
        }
        place = self.scratch / f"{target.name}-joined"
        self._emit(target, {name: outcome.model for name, outcome in outcomes.items()}, place)
        return self._contender(target, outcomes, "", place)

    def _measure(self, target: Backend, places: Sequence[Path]) -> list[dict[str, dict[str, Timing]]]:
        """For the plain lowering and then each of ``places``: a timing of each component at each shape."""
        folders = [self._plain(target), *places]
        signatures = self.lowered.program.signatures
        found: list[dict[str, dict[str, Timing]]] = [{name: {} for name in signatures} for _ in folders]
        for component, signature in signatures.items():
            engines = [EngineRef(str(target), target.path_of(component, folder)) for folder in folders]
            for sizes in self.request.shapes or default_shapes(signature):
                case, shape = sized_case(signature, sizes)
                if shape not in found[0][component]:
                    for own, timing in zip(found, time_against_first(engines, [case] * len(engines)), strict=True):
                        own[component][shape] = timing
        return found

    def _plain(self, target: Backend) -> Path:
        """The engine of the plain lowering: no pass of ours, all optimizations of the runtime."""
        place = self.scratch / f"plain-{target.name}"
        if not place.is_dir():
            self._emit(target, {name: model.clone() for name, model in self.lowered.program.components.items()}, place)
        return place

    def _plain_instead(self, target: Backend, optimized: Candidate, place: Path) -> Candidate:
        """Put the plain lowering where an engine stands; CheckFailed if it is outside the budget itself."""
        replace_folder(self._plain(target), place)
        budgets = self._budgets(target, dict.fromkeys(optimized.outcomes, ()))
        plain = replace(optimized, place=place, budgets=budgets, fidelity=self._check(target, place))
        if plain.violations:
            raise CheckFailed("; ".join(plain.violations), where=f"the plain lowering for {target}")
        return plain

    def _copy_companion(self, name: Path, place: Path) -> None:
        if self.lowered.folder is not None:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if name in self.lowered.rewritten:
                (place / name).write_text(self.lowered.rewritten[name], encoding="utf-8")
                return
            onnx_io.copy_file(self.lowered.folder / name, place / name)
