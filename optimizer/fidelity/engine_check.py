"""Comparison of engines with the reference: every component on every case, and the continuations of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from planish.optimizer.errors import BadInput, CheckFailed, InternalError, MissingRuntime, NoAnswer, PlanishError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.generation_metrics import compare_continuations
from planish.optimizer.fidelity.metrics import Comparison, compare
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.fidelity.reference import Reference, References
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.ir.program import Signature
from planish.optimizer.runtime.interpreter import runner_of
from planish.optimizer.runtime.worker import EngineRef, Worker
from planish.optimizer.system.machine import demand_memory

UNUSABLE = (BadInput, CheckFailed, MissingRuntime, InternalError, NoAnswer)
"""Errors of an engine that cannot be opened, or does not run."""


@dataclass(frozen=True)
class Fidelity:
    """Comparison of an engine with the reference, the runtime, and the peak memory in bytes (of the largest
    component)."""

    comparisons: Parts[Comparison]
    checked_with: str
    peak_memory: int
    failure: str | None = None
    """Reason why nothing was compared: the engine cannot be opened, or does not run."""

    def violations(self, budgets: Parts[Budget]) -> list[str]:
        """One text for each violated condition."""
        if self.failure is not None:
            return [self.failure]
        compared, asked = self.comparisons.by_name(), budgets.by_name()
        return [
            violation if len(compared) == 1 else f"{name}: {violation}"
            for name, comparison in compared.items()
            for violation in asked[name].violations(comparison)
        ]

    def comparison(self) -> Comparison:
        """All comparisons as one; with several components, outputs are named `component.output`."""
        compared = self.comparisons.by_name()
        if len(compared) == 1:
            return next(iter(compared.values()))
        return Comparison({f"{name}.{output}": m for name, c in compared.items() for output, m in c.outputs.items()})


def unusable(target: Backend, place: Path, error: PlanishError) -> Fidelity:
    """The fidelity of an engine in ``place`` that cannot be used. Paths of this machine stay out of the files."""
    what = " ".join(error.what.split()).replace(str(place), place.name)
    return Fidelity(Parts({}), target.name, 0, f"it cannot be used ({what})")


def demand_room(target: Backend, weights: int) -> None:
    """Raise OutOfResources if the runtime that checks ``target`` copies all weights (bytes) and they exceed memory."""
    runner = runner_of(target)
    if runner.mapped() is None:
        demand_memory(
            weights,
            f"{runner.name}, which copies all weights,",
            "leave this target out, build it on a larger machine, or unchecked with --reference none",
            where=f"target {target}",
        )


def check_engines(
    target: Backend,
    place: Path,
    signatures: Mapping[str, Signature],
    references: References,
    *,
    mapped: bool = False,
) -> Fidelity:
    """Compare every component with its reference on every case, each in its own process; then the continuations.

    If the target's runtime is not installed, the checking backend runs its graphs. With ``mapped``, the runtime maps
    weights from their files if it can.
    """
    # Without its runtime, a target's graph file is checked in place of its compiled engine.
    has_runtime = target.missing() is None
    runner = runner_of(target, mapped)
    checked = {
        name: check_engine(
            EngineRef(str(runner), target.path_of(name, place) if has_runtime else place / target.file_of(name)),
            signature,
            references.components[name],
        )
        for name, signature in signatures.items()
    }
    comparisons = Parts({component: comparison for component, (comparison, _) in checked.items()})
    if references.continuations:
        with Worker(EngineRef(str(runner), place, tuple(signatures))) as worker:
            scores = [worker.score_teacher_forced(continuation) for continuation in references.continuations]
        written = compare_continuations(zip(references.continuations, scores, strict=True))
        comparisons = replace(comparisons, continuations=written)
    return Fidelity(comparisons, str(runner) if mapped else runner.name, max(memory for _, memory in checked.values()))


def check_as_loaders_open(
    default: Backend, place: Path, signatures: Mapping[str, Signature], references: References
) -> Fidelity:
    """Check an engine opened without options, as loaders do, although it was built for others.

    A failure is part of the result, and no failure of the engine.
    """
    try:
        return check_engines(default, place, signatures, references)
    # Default options are not those of the build, so that a failure must not end it.
    except UNUSABLE as error:
        return unusable(default, place, error)


def check_engine(engine: EngineRef, signature: Signature, reference: Reference) -> tuple[Comparison, int]:
    """Compare one graph with the reference on every case; returns also the peak memory in bytes."""
    with Worker(engine) as worker:
        try:
            comparison = compare(signature, reference.inputs, reference.outputs, map(worker.run, reference.inputs))
        except ValueError as error:
            raise CheckFailed(str(error), where=engine.path) from error
        return comparison, worker.memory()
