"""Engines held against the reference: every component on every case, and the continuations of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.errors import BadInput, CheckFailed, InternalError, MissingRuntime
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.generation_metrics import compare_continuations
from planish.optimizer.fidelity.metrics import Comparison, compare
from planish.optimizer.fidelity.reference import Reference, References
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.ir.program import Signature
from planish.optimizer.runtime.interpreter import runner_of
from planish.optimizer.runtime.worker import EngineRef, Worker
from planish.optimizer.system.machine import demand_memory

GENERATION = "generation"
"""Where the comparison of continuations stands among those of the components."""


@dataclass(frozen=True)
class Fidelity:
    """How an engine compares with the reference, what ran it, and its peak memory in bytes (of the largest part)."""

    comparisons: Mapping[str, Comparison]
    """By component."""
    checked_with: str
    peak_memory: int
    failure: str | None = None
    """Why there is nothing to compare: it cannot be opened, or does not run."""

    def violations(self, budgets: Mapping[str, Budget]) -> list[str]:
        """One text for each condition that does not hold."""
        if self.failure is not None:
            return [self.failure]
        return [
            violation if len(self.comparisons) == 1 else f"{name}: {violation}"
            for name, comparison in self.comparisons.items()
            for violation in budgets[name].violations(comparison)
        ]

    def comparison(self) -> Comparison:
        """The comparisons as one; where there are several components, outputs are called `component.output`."""
        if len(self.comparisons) == 1:
            return next(iter(self.comparisons.values()))
        return Comparison(
            {f"{name}.{output}": m for name, c in self.comparisons.items() for output, m in c.outputs.items()}
        )


def demand_room(target: Backend, weights: int) -> None:
    """OutOfResources if what checks an engine of ``target`` must hold all its weights (bytes), and they do not fit."""
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
    """Compare every component with its reference on every case, each in a process of its own; then the continuations.

    Where the target's own runtime is not here, the checking backend runs its graphs. With ``mapped``, weights stay in
    their files where the runtime can leave them there.
    """
    own = target.missing() is None
    runner = runner_of(target, mapped)
    found = {
        name: check_engine(
            EngineRef(str(runner), target.path_of(name, place) if own else place / target.file_of(name)),
            signature,
            references.components[name],
        )
        for name, signature in signatures.items()
    }
    comparisons = {component: comparison for component, (comparison, _) in found.items()}
    if references.continuations:
        with Worker(EngineRef(str(runner), place, tuple(signatures))) as worker:
            scores = [worker.score_teacher_forced(continuation) for continuation in references.continuations]
        comparisons[GENERATION] = compare_continuations(zip(references.continuations, scores, strict=True))
    return Fidelity(comparisons, str(runner) if mapped else runner.name, max(memory for _, memory in found.values()))


def check_as_loaders_open(
    default: Backend, place: Path, signatures: Mapping[str, Signature], references: References
) -> Fidelity:
    """The same of an engine that is opened as loaders do who give no options, which is not what it was built for.

    That it cannot be opened so, or breaks, is found out about it, and no fault of the engine.
    """
    try:
        return check_engines(default, place, signatures, references)
    except (BadInput, CheckFailed, MissingRuntime, InternalError) as error:
        what = " ".join(error.what.split()).replace(str(place), place.name)
        return Fidelity({}, default.name, 0, f"it cannot be used ({what})")


def check_engine(engine: EngineRef, signature: Signature, reference: Reference) -> tuple[Comparison, int]:
    """Compare one graph with the reference on every case; also its peak memory in bytes."""
    with Worker(engine) as worker:
        try:
            found = compare(signature, reference.inputs, reference.outputs, map(worker.run, reference.inputs))
        except ValueError as error:
            raise CheckFailed(str(error), where=engine.path) from error
        return found, worker.memory()
