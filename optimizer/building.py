"""One engine: pipeline, emission, check, and the choice whether it is shipped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from planish.optimizer import instruments, onnx_io, presets, registry
from planish.optimizer.backend import Arrays, Backend
from planish.optimizer.base import Pass
from planish.optimizer.compare import Budget, Comparison, compare
from planish.optimizer.errors import CheckFailed
from planish.optimizer.lock import Choice, LockedPass, Speed
from planish.optimizer.lowering import Lowered
from planish.optimizer.manifest import instruction_set
from planish.optimizer.measure import EngineRef, Timing, Worker, race
from planish.optimizer.pipeline import Outcome, Pipeline
from planish.optimizer.program import Signature
from planish.optimizer.reference import Reference, leading_axis, make_case, quick, thin

CHECKER = "onnxruntime"
"""The backend that runs graphs between passes, and engines whose own runtime is not here."""
DEFAULT_SHAPE: Mapping[str, int] = {"batch": 1, "choices": 4, "sequence": 128}
"""Sizes at which engines are timed when none are asked for; axes of other names count 1."""


@dataclass(frozen=True)
class Request:
    """What was asked for, checked before anything is done."""

    targets: tuple[Backend, ...]
    preset: str | None
    pipelines: Mapping[str, Pipeline]
    """By the name of the target."""
    asked: Budget
    """What `--keep` says; without it, the default of the preset."""
    shapes: tuple[Mapping[str, int], ...]

    def described(self) -> dict[str, str]:
        """The request as texts, for lock and manifest."""
        what = {"preset": self.preset} if self.preset else {"pipeline": str(next(iter(self.pipelines.values())))}
        return what | {"budget": str(self.asked)}


@dataclass
class Built:
    """A finished engine folder and all that is known about it."""

    target: Backend
    outcome: Outcome
    choice: Choice
    budget: Budget
    comparison: Comparison
    checked_with: str
    timings: Mapping[str, Mapping[str, Timing]]
    """Per shape: `plain` and `optimized`; empty if nothing was measured."""
    peak_memory: int


@dataclass
class Stages:
    """Tells the user what is being done, and remembers how long each stage took."""

    report: Callable[[str, int, int], None]
    total: int
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage of the build."""
        self.report(name, self.done, self.total)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.done += 1


@dataclass
class Builder:
    """Builds engines of one lowered source."""

    request: Request
    lowered: Lowered
    reference: Callable[[], Reference]
    inputs: Sequence[Arrays]
    """The reference inputs; the outputs may still be on their way."""
    folder: Path
    """Where the engines' folders are made."""
    scratch: Path
    reproducers: Path
    stages: Stages
    notes: list[str] = field(default_factory=list)
    """What the user should read after the build."""

    def build(self, target: Backend, choice: Choice | None) -> Built:
        """Build the engine of one target; ``choice`` says what to do if it was decided before."""
        with self.stages.stage(f"{target.name}: passes"):
            outcome = self._run_passes(target, choice)
        place = self.folder / target.name
        with self.stages.stage(f"{target.name}: emission"):
            self._emit(target, outcome.model, place)
        with self.stages.stage(f"{target.name}: check"):
            budget = self._budget(outcome.applied.passes)
            fidelity = self._check(target, place)
        violations = budget.violations(fidelity.comparison)
        if violations and self.request.preset is None:
            raise CheckFailed(
                "; ".join(violations), where=f"target {target}", advice="choose other passes or a wider budget"
            )
        timings: Mapping[str, Mapping[str, Timing]] = {}
        if choice is None:
            choice, timings = self._choose(target, outcome, place, violations)
        elif violations and choice.shipped == "optimized":
            raise CheckFailed(
                "; ".join(violations), where=f"target {target}", advice="the lock does not hold here: remove it"
            )
        if choice.shipped == "plain":
            fidelity, budget = self._ship_plain(target, place), self._budget([])
            budget.check(fidelity.comparison, where=f"the plain lowering for {target}")
        for name in self.lowered.companions:
            self._copy_companion(name, place)
        return Built(
            target, outcome, choice, budget, fidelity.comparison, fidelity.checked_with, timings, fidelity.peak_memory
        )

    def _run_passes(self, target: Backend, choice: Choice | None) -> Outcome:
        """Run the pipeline over a copy of the program; presets undo passes that leave the budget, locks never do."""
        pipeline = self.request.pipelines[target.name] if choice is None else Pipeline.parse(choice.pipeline)
        model, signature = self.lowered.program.sole()
        checker = registry.backend(CHECKER)
        undo = self.request.preset is not None and choice is None
        reproducer = instruments.Reproducer(self.reproducers, onnx_io.save, bugs_only=undo)
        watchers = [
            reproducer,
            instruments.CompareEach(signature, quick(self.inputs), self._budget_of, checker.load),
            instruments.VerifyEach(),
            instruments.Timing(),
        ]
        outcome = pipeline.run(model.clone(), watchers, on_failure="rollback" if undo else "raise")
        self.notes += [f"an exact pass was undone, which is a bug; reproduce with: {c}" for c in reproducer.commands]
        return outcome

    def _budget_of(self, step: Pass) -> Budget:
        """What one pass may change: rounding if it is exact, else what was asked for."""
        return self.reference().exact_budget() if step.exact else self.request.asked

    def _budget(self, passes: Sequence[Pass]) -> Budget:
        """What a whole engine may differ from the reference."""
        exact = self.reference().exact_budget() if all(step.exact for step in passes) else Budget()
        return Budget((*exact.clauses, *self.request.asked.clauses))

    def _emit(self, target: Backend, model: ir.Model, place: Path) -> None:
        place.mkdir(parents=True)
        program = self.lowered.program
        target.emit(replace(program, components=dict.fromkeys(program.components, model)), place)

    def _check(self, target: Backend, place: Path) -> Fidelity:
        """Run the engine on every reference input, in a process of its own."""
        engine = checkable(target, place)
        return check_engine(engine, self.lowered.program.sole()[1], self.reference())

    def _choose(
        self, target: Backend, outcome: Outcome, place: Path, violations: Sequence[str]
    ) -> tuple[Choice, Mapping[str, Mapping[str, Timing]]]:
        """Decide by the budget first, then by the clock, against the plain lowering on the same target."""
        undone = [LockedPass(text=r.text, reason=r.rolled_back) for r in outcome.reports if r.rolled_back is not None]
        base = Choice(
            target=str(target),
            pipeline=str(outcome.applied),
            rolled_back=undone,
            shipped="optimized",
            why="",
            machine=instruction_set(),
            measured=[],
        )
        if violations:
            return base.model_copy(update={"shipped": "plain", "why": f"outside the budget: {violations[0]}"}), {}
        missing = target.missing()
        if missing is not None:
            return base.model_copy(update={"why": f"not measured: {missing}"}), {}
        with self.stages.stage(f"{target.name}: measurement"):
            timings = self._measure(target, place)
        speeds = [
            Speed(
                shape=shape,
                speedup=_short(t["optimized"].speedup),
                low=_short(t["optimized"].low),
                high=_short(t["optimized"].high),
            )
            for shape, t in timings.items()
        ]
        faster = math.prod(timing["optimized"].low for timing in timings.values()) > 1
        why = "faster than the plain lowering" if faster else "not measurably faster than the plain lowering"
        shipped = "optimized" if faster else "plain"
        return base.model_copy(update={"shipped": shipped, "why": why, "measured": speeds}), timings

    def _measure(self, target: Backend, place: Path) -> dict[str, dict[str, Timing]]:
        plain = self._plain(target)
        signature = self.lowered.program.sole()[1]
        engines = [EngineRef(str(target), path) for path in (plain, place)]
        found = {}
        for sizes in self.request.shapes or (DEFAULT_SHAPE,):
            case, shape = sized_case(signature, sizes)
            timings = race(engines, [case, case])
            found[shape] = dict(zip(("plain", "optimized"), timings, strict=True))
        return found

    def _plain(self, target: Backend) -> Path:
        """The engine of the plain lowering: no pass of ours, all optimizations of the runtime."""
        place = self.scratch / f"plain-{target.name}"
        if not place.is_dir():
            self._emit(target, self.lowered.program.sole()[0].clone(), place)
        return place

    def _ship_plain(self, target: Backend, place: Path) -> Fidelity:
        plain = self._plain(target)
        shutil.rmtree(place)
        shutil.copytree(plain, place)
        return self._check(target, place)

    def _copy_companion(self, name: Path, place: Path) -> None:
        if self.lowered.folder is not None:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            onnx_io.copy_file(self.lowered.folder / name, place / name)


@dataclass(frozen=True)
class Fidelity:
    """How an engine compares with the reference, what ran it, and its peak memory in bytes."""

    comparison: Comparison
    checked_with: str
    peak_memory: int


def checkable(target: Backend, place: Path) -> EngineRef:
    """The engine as its own runtime opens it, or, where that is not here, as the checking backend does."""
    if target.missing() is None:
        return EngineRef(str(target), place)
    return EngineRef(CHECKER, place / "model.onnx")


def check_engine(engine: EngineRef, signature: Signature, reference: Reference) -> Fidelity:
    """Compare an engine with the reference on every case."""
    with Worker(engine) as worker:
        outputs = [thin(worker.run(case)) for case in reference.inputs]
        memory = worker.memory()
    try:
        comparison = compare(signature, reference.inputs, reference.outputs, outputs)
    except ValueError as error:
        raise CheckFailed(str(error), where=engine.path) from error
    return Fidelity(comparison, engine.target.partition("{")[0], memory)


def sized_case(signature: Signature, sizes: Mapping[str, int]) -> tuple[Arrays, str]:
    """A case of the sizes asked for, as far as the axes allow them, and the text of the sizes that it has.

    An axis that is not named takes the size of what it is by its place: `batch` if it leads the first input,
    `sequence` if tokens run along it, else 1.
    """
    known = {
        name: axis.clamp(sizes.get(name, sizes.get(_usual_name(signature, name), 1)))
        for name, axis in signature.axes.items()
    }
    text = ",".join(f"{name}={size}" for name, size in known.items()) or "fixed"
    return make_case(signature, known, np.random.default_rng(0)), text


def _usual_name(signature: Signature, axis: str) -> str:
    if axis == leading_axis(signature):
        return "batch"
    along = [tensor for tensor in signature.inputs if tensor.dtype.is_integer() and axis in tensor.shape[1:]]
    return "sequence" if along else axis


def pipelines_for(targets: Sequence[Backend], preset: str | None, text: str | None) -> dict[str, Pipeline]:
    """The pipeline of each target: the text that was given, or what the preset says."""
    return {
        target.name: Pipeline.parse(text if text is not None else presets.pipeline_text(preset or "exact", target.name))
        for target in targets
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
