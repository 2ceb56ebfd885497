"""The request of a build, checked before anything is done."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planish.optimizer.errors import UsageError
from planish.optimizer.fidelity.budget import Budget, measured_metrics, metrics_of
from planish.optimizer.fidelity.inputs import refuse_other_sizes
from planish.optimizer.fidelity.user_metric import Evaluation
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.interfaces.recipe import When
from planish.optimizer.ir.program import Program, Signature
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from planish.optimizer.compilation.options import BuildOptions


@dataclass(frozen=True)
class Request:
    """Targets, pipelines, budget and sizes."""

    targets: tuple[Backend, ...]
    preset: str | None
    pipelines: Mapping[str, Pipeline]
    """By the name of the target."""
    asked: Budget
    """The budget of `--keep`; without it, the default of the preset."""
    shapes: tuple[Mapping[str, int], ...]
    extras: Mapping[str, Pipeline]
    """Passes that are tried behind the pipelines of each target, by its name, and kept where that is faster."""
    alternatives: Mapping[str, Sequence[Pipeline]]
    """Pipelines that are tried instead, by the name of the target, and kept where they are faster."""
    stepping: Mapping[str, Sequence[Pipeline]]
    """More of them, for programs that write token by token."""
    evaluation: Evaluation | None
    """The user's own measure of an engine."""
    last_logits: bool
    """True if a decoder gives the scores behind the last token only."""
    profile: Path | None
    """Where is kept what the targets run fast; passes keep their usual options without."""

    @property
    def fixed(self) -> Mapping[str, int]:
        """Axes that every engine has in one size only."""
        return next(iter(self.pipelines.values())).fixed

    def described(self) -> dict[str, str]:
        """The request as texts, for lock and manifest."""
        what = {"preset": self.preset} if self.preset else {"pipeline": str(next(iter(self.pipelines.values())))}
        fixed = {"fixed": ",".join(f"{axis}={size}" for axis, size in self.fixed.items())} if self.fixed else {}
        own = {} if self.evaluation is None else {"evaluate": str(self.evaluation)}
        last = {"logits": "last"} if self.last_logits else {}
        return what | fixed | last | own | {"budget": str(self.asked)}

    def instead(self, target: Backend, *, writes: bool) -> list[Pipeline]:
        """Pipelines that are tried instead of a target's own; ``writes`` is true for a program that generates."""
        return [*self.alternatives.get(target.name, ()), *(self.stepping.get(target.name, ()) if writes else ())]

    @property
    def beginning(self) -> tuple[Pass, ...]:
        """The common beginning of all pipelines, up to the first pass that asks for timings or statistics."""
        others = [one for known in (self.alternatives, self.stepping) for group in known.values() for one in group]
        every = [pipeline.passes for pipeline in (*self.pipelines.values(), *others)]
        alike = itertools.takewhile(lambda steps: len(set(map(str, steps))) == 1, zip(*every, strict=False))
        plain = itertools.takewhile(lambda step: not step.is_adaptive, (steps[0] for steps in alike))
        return tuple(plain) if len(every) > 1 else ()

    def steering(self, signature: Signature) -> Budget:
        """The budget that each pass on a component must keep: the clauses that can be measured of its outputs.

        If there are none (a budget of tokens, of the user's own measure, or of scores that only another component
        has), it is the default of the preset.
        """
        clauses = self.asked.only(metrics_of(signature))
        if clauses.clauses or not self.asked.clauses:
            return clauses
        return presets.budget(self.preset).only(metrics_of(signature))

    def replaced(self, program: Program) -> list[str]:
        """Notes on the components whose passes are held against the default of the preset, since `--keep` says nothing
        of their outputs."""
        return [
            f"--keep {self.asked} cannot be measured of {'its graph' if name == 'model' else f'the {name}'} alone: "
            f"passes that are not exact are held against {self.steering(signature)} there"
            for name, signature in program.signatures.items()
            if self.asked.clauses and self.preset is not None and not self.asked.only(metrics_of(signature)).clauses
            if presets.budget(self.preset).clauses
        ]

    def passes_for(self, target: Backend) -> list[Pass]:
        """Every pass that may run for a target: of its pipeline, and of what is tried behind or instead of it."""
        others = [
            *self.alternatives.get(target.name, ()),
            *self.stepping.get(target.name, ()),
            self.extras[target.name],
        ]
        return [step for pipeline in (self.pipelines[target.name], *others) for step in pipeline.passes]

    @property
    def observes(self) -> bool:
        """True if a pass that may run requests statistics of activations."""
        return any(step.observes for target in self.targets for step in self.passes_for(target))

    def check_fits(self, program: Program) -> None:
        """UsageError if a budget or a size was asked for that this program cannot be held against."""
        self.asked.refuse_unmeasured(measured_metrics(program, evaluated=self.evaluation is not None))
        refuse_other_sizes(program.signatures.values(), self.shapes)


def request_of(options: BuildOptions, *, calibrated: bool) -> Request:
    """The request of these options, with calibration data or without.

    The preset is `exact` where neither a preset nor a pipeline is given. UsageError for options that exclude each
    other or would do nothing.
    """
    preset, pipeline, shapes = options.preset, options.pipeline, options.shapes
    _refuse_idle(options, calibrated=calibrated)
    if preset is not None and pipeline is not None:
        raise UsageError("a preset and a pipeline exclude each other", advice="give one of them")
    if options.profile is not None and pipeline is not None:
        raise UsageError("a profile chooses for presets, not for a pipeline", advice="write the options into the text")
    backends = tuple(registry.backend(text) for text in options.targets)
    names = [backend.name for backend in backends]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"each target must be given once, got {names}", advice="build two folders for two variants")
    preset = "exact" if pipeline is None and preset is None else preset
    budget = Budget.parse(options.keep) if options.keep else presets.budget(preset)
    evaluation = None if options.evaluate is None else Evaluation.parse(options.evaluate)
    _refuse_unmeasured(budget, options)
    first = [option_text.format_spec(presets.SPECIALIZE, options.fix)] if options.fix else []
    padded = any(sizes.get("batch", 1) > 1 for sizes in shapes)
    return Request(
        targets=backends,
        preset=preset,
        pipelines=_pipelines_for(backends, preset, pipeline, first, calibrated=calibrated),
        asked=budget,
        shapes=tuple(shapes),
        extras=_extras(backends, preset if padded else None),
        alternatives=_tried(backends, preset, [When.ALTERNATIVE, *([When.CALIBRATED] if calibrated else [])], first),
        stepping=_tried(backends, preset, [When.GENERATING], first),
        evaluation=evaluation,
        last_logits=options.logits == "last",
        profile=None if options.profile is None else Path(options.profile),
    )


def _refuse_unmeasured(budget: Budget, options: BuildOptions) -> None:
    """UsageError for clauses of a budget that these options leave without a value."""
    metrics = [clause.metric for clause in budget.clauses]
    if options.evaluate is None and any(metric.startswith("score") for metric in metrics):
        raise UsageError("a budget on score needs a command that prints it", where="--keep", advice="give --evaluate")
    if options.logits == "last" and "perplexity" in metrics:
        raise UsageError("perplexity needs the scores behind every token", where="--logits last", advice="keep kl<=X")


def _refuse_idle(options: BuildOptions, *, calibrated: bool) -> None:
    """UsageError for options that would do nothing beside ``options.reference``."""
    reference, keep = options.reference, options.keep
    where, advice = f"--reference {reference}", "leave one of the two out"
    if reference == "none" and keep:
        raise UsageError("nothing is compared, so no budget can be kept", where=f"--keep {keep[0]}", advice=advice)
    if reference == "none" and options.evaluate is not None:
        raise UsageError("engines that nothing is compared with are not judged", where="--evaluate")
    if reference == "none" and calibrated and options.pipeline is None:
        raise UsageError("a preset runs no pass then, so nothing is calibrated", where=where, advice=advice)
    if reference != "full" and options.shapes:
        raise UsageError("nothing is timed then, at no --shape", where=where, advice=advice)


def _pipelines_for(
    targets: Sequence[Backend], preset: str | None, text: str | None, first: Sequence[str], *, calibrated: bool
) -> dict[str, Pipeline]:
    """The pipeline of each target, behind ``first``: the text that was given, or what the preset says."""
    said = functools.partial(presets.pipeline_text, preset or "exact", calibrated=calibrated)
    texts = {t.name: said(t.name) if text is None else text for t in targets}
    return {name: Pipeline.parse(",".join([*first, own])) for name, own in texts.items()}


def _extras(targets: Sequence[Backend], preset: str | None) -> dict[str, Pipeline]:
    """Passes that are tried behind the pipelines of each target, for several texts of which some are padded."""
    tried = _tried(targets, preset, [When.PADDED], ())
    return {name: Pipeline(tuple(step for one in own for step in one.passes)) for name, own in tried.items()}


def _tried(
    targets: Sequence[Backend], preset: str | None, cases: Sequence[When], first: Sequence[str]
) -> dict[str, list[Pipeline]]:
    """The recipes that a preset, if there is one, tries for each target in some cases, each behind ``first``."""
    recipes_of = {
        t.name: [r for c in cases if preset is not None for r in presets.recipes(preset, t.name, c)] for t in targets
    }
    return {
        name: [Pipeline.parse(",".join([*first, *each.passes])) for each in recipes]
        for name, recipes in recipes_of.items()
    }
