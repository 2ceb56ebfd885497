"""Records of a build: what the manifest, `sites.json` and the measurements say of each engine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planish.optimizer.calibration.data import Samples
from planish.optimizer.calibration.sources import GIVEN, digest_of_data, origin_of_data, tokenizer_of
from planish.optimizer.compilation.candidates import NOT_CHECKED, OFFLOADED
from planish.optimizer.compilation.engine import Builder, BuiltEngine
from planish.optimizer.compilation.progress import Stages
from planish.optimizer.compilation.request import ReferenceMode
from planish.optimizer.compilation.result import Result
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.reference import References
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering import Lowered
from planish.optimizer.output import manifest as records
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.output.report import write_report
from planish.optimizer.output.sites import write_sites
from planish.optimizer.runtime.tokenization import LIGHT_TASKS, TokenizerRecord, light_record
from planish.optimizer.system.machine import instruction_set, library_version, library_versions
from planish.optimizer.system.staging import MEASUREMENTS
from planish.optimizer.timing.tuning_table import Profile, host_of

NOTHING = "nothing"
"""What passes were calibrated on that saw no activations."""


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


def target_record(built: BuiltEngine, folder: Path) -> records.TargetRecord:
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


def loader_record(built: BuiltEngine) -> records.LoaderRecord | None:
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


def measurements_of(built: Sequence[BuiltEngine], stages: Stages, profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """Everything that may differ between two equal builds."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "instruction_set": instruction_set()},
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


def light_tokenizer(lowered: Lowered) -> TokenizerRecord | None:
    """How `run` reads the tokenizer without transformers, if it can."""
    if lowered.folder is None or lowered.program.task not in LIGHT_TASKS:
        return None
    try:
        tokenizer = tokenizer_of(lowered)
    except BadInput:  # engines are built without a tokenizer too; `run` says what is wrong with it
        return None
    return None if tokenizer is None else light_record(tokenizer, lowered.folder)


def write_output(
    folder: Path, builder: Builder, built: Sequence[BuiltEngine], data: Samples | None, mode: ReferenceMode
) -> Result:
    """Write reference, lock, measurements, report and manifest into a folder that holds the engines."""
    request, lowered = builder.request, builder.lowered
    references = None if builder.references is None else builder.references()
    if references is not None:
        references.save(folder / "reference")
    calibrated = builder.calibrated(built)
    origin = origin_of_data(lowered, data) if calibrated else NOTHING
    choices = {engine.target.name: engine.choice for engine in built}
    source = dict(lowered.program.provenance.files)
    digest = digest_of_data(lowered, data) if calibrated else ""
    locked = Lock(source=source, requested=request.described(), calibration=digest, targets=choices)
    (folder / LOCK).write_text(locked.text(), encoding="utf-8")
    measurements = measurements_of(built, builder.stages, builder.profiles)
    (folder / MEASUREMENTS).write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")
    manifest = Manifest(
        planish=library_version("planish"),
        libraries=library_versions(registry.libraries()),
        instruction_set=instruction_set(),
        source=records.source_record(lowered.program),
        task=lowered.program.task,
        signatures={n: records.SignatureRecord.of(s) for n, s in lowered.program.signatures.items()},
        requested=request.described(),
        reference=reference_record(lowered, references, origin, data, mode),
        targets={engine.target.name: target_record(engine, folder) for engine in built},
        files={},
        tokenizer=light_tokenizer(lowered),
    )
    write_sites(folder, [record for engine in built for record in engine.rewritten.sites])
    write_report(folder, manifest, locked)
    manifest = manifest.model_copy(update={"files": records.hash_files(folder)})
    manifest.write(folder)
    made_up = origin not in (NOTHING, GIVEN)
    told = [f"calibrated on inputs {origin}, which are not like yours: give --calibration"] if made_up else []
    told += lowered.program.provenance.notes if lowered.program.provenance.kind == "checkpoint" else ()
    return Result(folder, manifest, measurements, [*builder.notes, *told])
