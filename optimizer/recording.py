"""Records of a build: what the manifest, `sites.json` and the measurements say of each engine."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from planish.optimizer import manifest as records
from planish.optimizer.building import NOT_CHECKED, OFFLOADED, Built
from planish.optimizer.calibration import Samples
from planish.optimizer.lowering import Lowered
from planish.optimizer.profile import Profile, host_of
from planish.optimizer.reference import References
from planish.optimizer.stages import Stages

GIVEN, NOTHING = "given", "nothing"
"""What is said of the user's own inputs, and of passes that saw none."""
ReferenceMode = Literal["full", "offload", "none"]


def reference_record(
    lowered: Lowered, references: References | None, calibrated_on: str, data: Samples | None, mode: ReferenceMode
) -> records.ReferenceRecord:
    """How the reference was made, and what was compared with it."""
    known = {} if references is None else references.components
    inputs = "made from the signature" if data is None else GIVEN
    passes = {"full": "compared one by one", "offload": f"not compared one by one: {OFFLOADED}", "none": NOT_CHECKED}
    return records.ReferenceRecord(
        mode=mode,
        passes=passes[mode],
        origin=NOT_CHECKED if references is None else lowered.original.description,
        inputs="none" if references is None else inputs,
        calibrated_on=calibrated_on,
        noise={name: dict(reference.noise) for name, reference in known.items()},
        exact_budget={name: str(reference.exact_budget()) for name, reference in known.items()},
    )


def target_record(built: Built, folder: Path) -> records.TargetRecord:
    """One engine: its choice, passes, budgets and fidelity; ``folder`` is the output."""
    choice = built.choice
    place = folder / built.target.name
    return records.TargetRecord(
        target=choice.target,
        shipped=choice.shipped,
        why=choice.why,
        pipelines=choice.pipelines if choice.shipped == "optimized" else {},
        passes=[
            records.PassRecord.of(name, report)
            for name, outcome in built.outcomes.items()
            for report in outcome.reports
            if report.rolled_back is None
        ],
        rolled_back=[records.RolledBack(**undone.model_dump()) for undone in choice.rolled_back],
        budgets={name: str(budget) for name, budget in built.budgets.items()},
        checked_with=built.fidelity.checked_with,
        comparison=records.figures(built.fidelity.comparison()),
        canonical_operators=dict(built.rewritten.operators),
        operators=dict(built.rewritten.shipped),
        as_loaders_open=loader_record(built),
        size_bytes=sum(path.stat().st_size for path in sorted(place.rglob("*")) if path.is_file()),
    )


def loader_record(built: Built) -> records.LoaderRecord | None:
    """What a loader that is given no options gets of an engine, where that differs from what was checked."""
    fidelity, target = built.as_loaders_open, built.target.as_loaders_open()
    if fidelity is None or target is None:
        return None
    budgets = {name: budget for name, budget in built.budgets.items() if name in fidelity.comparisons}
    return records.LoaderRecord(
        target=str(target),
        comparison=records.figures(fidelity.comparison()),
        violations=fidelity.violations(budgets),
    )


def measurements_of(built: Sequence[Built], stages: Stages, profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """Everything that may differ between two equal builds."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "instruction_set": records.instruction_set()},
        "stages_seconds": stages.seconds,
        "profile": {host_of(profile.target): profile.described() for profile in profiles.values()},
        "targets": {
            engine.target.name: {
                "latency_ms": {
                    shape: {kind: timing.__dict__ for kind, timing in timings.items()}
                    for shape, timings in engine.timings.items()
                },
                "check_peak_memory_bytes": engine.fidelity.peak_memory,
                "passes": {
                    name: {report.text: report.measured for report in outcome.reports}
                    for name, outcome in engine.outcomes.items()
                },
            }
            for engine in built
        },
    }
