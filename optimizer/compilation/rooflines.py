"""Rooflines of the engines of a build, at the shapes at which they are timed."""

from __future__ import annotations

from planish.optimizer.compilation.engine import BuiltEngine
from planish.optimizer.compilation.job import Checks, Job
from planish.optimizer.errors import OutOfResources
from planish.optimizer.fidelity.engine_check import UNUSABLE
from planish.optimizer.fidelity.inputs import default_shapes, sized_case
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.roofline import Roofline, roofline


def rooflines_of(job: Job, built: BuiltEngine) -> tuple[dict[str, Roofline], list[str]]:
    """Shape -> roofline of an engine in the output, and a note where there is none: a build does not fail for it."""
    target, rooflines = built.target, dict[str, Roofline]()
    if job.checks is Checks.OFFLOAD:
        return {}, [f"no roofline of {target.name}: its weights stay in their files"]
    if target.missing() is not None or not target.has_counters:
        return {}, [f"no roofline of {target.name}: its runtime is not here, or tells no time of single operators"]
    signatures = job.program.signatures
    for component, signature in signatures.items():
        engine = EngineRef(str(target), target.path_of(component, job.places.engines / target.name))
        for sizes in job.request.shapes or default_shapes(signature):
            case, shape = sized_case(signature, sizes)
            label = shape if len(signatures) == 1 else f"{component} {shape}"
            if label in rooflines:
                continue
            try:
                rooflines[label] = roofline(engine, case)
            except (*UNUSABLE, OutOfResources) as error:
                return rooflines, [f"no roofline of {target.name} at {label}: {error.what}"]
    return rooflines, []
