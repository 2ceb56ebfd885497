"""Rooflines of the engines of a build, at the shapes at which they are timed."""

from __future__ import annotations

from planish.optimizer.compilation.engine import BuiltEngine
from planish.optimizer.compilation.job import Job
from planish.optimizer.fidelity.inputs import default_shapes, sized_case
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.roofline import Roofline, roofline


def rooflines_of(job: Job, built: BuiltEngine) -> dict[str, Roofline]:
    """Shape -> roofline of an engine in the output; nothing where its runtime is missing or has no counters."""
    target, folder = built.target, job.places.engines / built.target.name
    if target.missing() is not None or not target.has_counters():
        return {}
    signatures = job.program.signatures
    rooflines = {}
    for component, signature in signatures.items():
        engine = EngineRef(str(target), target.path_of(component, folder))
        for sizes in job.request.shapes or default_shapes(signature):
            case, shape = sized_case(signature, sizes)
            label = shape if len(signatures) == 1 else f"{component} {shape}"
            if label not in rooflines:
                rooflines[label] = roofline(engine, case)
    return rooflines
