"""Recipes run over components: the graphs that passes make, and what was learned on the way.

Passes may be free or fixed. Free passes belong to a preset: one that leaves the budget is rolled back, quantization
passes choose the MatMuls that they skip, and the tuning table sets their options. Fixed passes come from a lock or
from `--pipeline`: they run as they are written, and a failed check ends the build.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.calibration.sensitivity import Loss, SelectMatMuls, tightened
from planish.optimizer.compilation.autotune import Tune
from planish.optimizer.compilation.job import Checks, Job
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.inputs import default_shapes, known_sizes, quick
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.ir import onnx_io
from planish.optimizer.pipeline.instruments import CompareEach, Instrument, MeasureCost, Reproducer, VerifyEach
from planish.optimizer.pipeline.pipeline import Outcome, Pipeline
from planish.optimizer.runtime.interpreter import load_mapped
from planish.optimizer.timing.tuning_table import Profile


@dataclass(frozen=True)
class Freedom:
    """The decisions that passes of a target may make."""

    free: bool
    """False for passes of a lock or of `--pipeline`."""
    share: float = 1.0
    """The share of the error that the budget allows which quantization may spend."""
    profile: Profile | None = None
    """The tuning table that sets options of free passes."""


@dataclass(frozen=True)
class Transformed:
    """A component after the passes of a recipe, and what was learned on the way."""

    recipe: str
    """The text of the pipeline that quantization chose its MatMuls in; extra passes behind it do not change it."""
    outcome: Outcome
    losses: Mapping[str, Sequence[Loss]]
    """By the text of a quantization pass: what quantizing each MatMul costs; empty if nothing was chosen."""
    calibrated: bool
    """True if a pass used statistics of activations."""
    notes: tuple[str, ...]
    """How to reproduce each exact pass that was rolled back, which is a bug."""


def untouched(model: ir.Model) -> Transformed:
    """A component of the plain lowering."""
    return Transformed("", Outcome(model.clone(), []), {}, False, ())


class Transformer:
    """Runs recipes of one job; what all recipes begin with is run once for each component."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._beginning = functools.cache(self._run_beginning)

    def run(self, component: str, pipeline: Pipeline, freedom: Freedom, say: Callable[[str], None]) -> Transformed:
        """Run ``pipeline`` over a copy of a component; ``say`` is told of statistics that are collected."""
        shared = self._job.request.beginning
        begun, rest = untouched(self._job.program.components[component]), pipeline
        if shared and pipeline.passes[: len(shared)] == shared:
            cached = self._beginning(component, freedom.free)
            begun = replace(cached, outcome=Outcome(cached.outcome.model.clone(), cached.outcome.reports))
            rest = Pipeline(pipeline.passes[len(shared) :])
        calibrate = self._calibrate(component, say)
        select = self._select(component, freedom) if freedom.free else None
        first: list[Instrument] = [*self._tune(component, freedom), calibrate, *([select] if select else [])]
        outcome, notes = self._run(component, begun.outcome.model, rest, first, free=freedom.free)
        return Transformed(
            recipe=str(pipeline),
            outcome=Outcome(outcome.model, [*begun.outcome.reports, *outcome.reports]),
            losses={} if select is None else select.found,
            calibrated=calibrate.asked,
            notes=(*begun.notes, *notes),
        )

    def run_behind(self, component: str, done: Transformed, extra: Pipeline) -> Transformed:
        """Run free passes ``extra`` over a copy of what a recipe made of a component."""
        outcome, notes = self._run(component, done.outcome.model.clone(), extra, (), free=True)
        reports = [*done.outcome.reports, *outcome.reports]
        return replace(done, outcome=Outcome(outcome.model, reports), notes=(*done.notes, *notes))

    def _run_beginning(self, component: str, free: bool) -> Transformed:
        model = self._job.program.components[component].clone()
        outcome, notes = self._run(component, model, Pipeline(self._job.request.beginning), (), free=free)
        return Transformed("", outcome, {}, False, notes)

    def _run(
        self, component: str, model: ir.Model, pipeline: Pipeline, first: Sequence[Instrument], *, free: bool
    ) -> tuple[Outcome, tuple[str, ...]]:
        reproducer = Reproducer(self._job.places.reproducers, onnx_io.save, bugs_only=free)
        # The reproducer stands in front of the checks: it must see their failures, and `failed` runs in reverse order.
        watchers = [*first, reproducer, *self._compare(component), VerifyEach(), MeasureCost()]
        outcome = pipeline.run(model, watchers, on_failure="rollback" if free else "raise")
        return outcome, tuple(
            f"an exact pass was undone, which is a bug; reproduce with: {command}" for command in reproducer.commands
        )

    def _compare(self, component: str) -> list[Instrument]:
        """The check of each pass against the model before it, where the weights are in memory."""
        if self._job.checks is not Checks.FULL:
            return []
        signature = self._job.program.signatures[component]
        budget_of = functools.partial(self._budget_of, component)
        load = registry.interpreter().load
        return [CompareEach(signature, quick(self._job.inputs[component]), budget_of, load)]

    def _budget_of(self, component: str, step: Pass) -> Budget:
        """The budget of one pass: the noise floor if it is exact, else the budget of the request."""
        if step.exact and self._job.references is not None:
            return self._job.references().components[component].exact_budget()
        return self._job.request.steering(self._job.program.signatures[component])

    def _calibrate(self, component: str, say: Callable[[str], None]) -> Calibrate:
        mapped = functools.partial(load_mapped, place=self._job.places.scratch / "observed")
        load = registry.interpreter().load if self._job.checks is Checks.FULL else mapped
        return Calibrate(self._job.program.signatures[component], self._job.batches[component], load, say)

    def _select(self, component: str, freedom: Freedom) -> SelectMatMuls | None:
        """The choice of MatMuls to quantize, if the outputs of the component have a budget and can be compared."""
        signature = self._job.program.signatures[component]
        steering, references = self._job.request.steering(signature), self._job.references
        if references is None or self._job.checks is not Checks.FULL or not steering.clauses:
            return None
        budget, load = tightened(steering, freedom.share), registry.interpreter().load
        return SelectMatMuls(signature, lambda: references().components[component], budget, load)

    def _tune(self, component: str, freedom: Freedom) -> list[Instrument]:
        if freedom.profile is None:
            return []
        signature = self._job.program.signatures[component]
        shapes = self._job.request.shapes or default_shapes(signature)
        return [Tune(freedom.profile, [known_sizes(signature, sizes) for sizes in shapes])]
