"""Records of a build: what the manifest, `sites.json` and the measurements say of each engine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planish.optimizer.calibration.sources import GIVEN, digest_of_data, origin_of_data, tokenizer_of
from planish.optimizer.compilation.engine import BuiltEngine
from planish.optimizer.compilation.job import Checks, Job
from planish.optimizer.compilation.progress import Stages
from planish.optimizer.compilation.result import Result
from planish.optimizer.compilation.verdicts import NOT_CHECKED, OFFLOADED
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.reference import References
from planish.optimizer.lowering import Lowered
from planish.optimizer.output import manifest as records
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.output.report import write_measurements, write_report
from planish.optimizer.output.sites import write_sites
from planish.optimizer.runtime.tokenization import LIGHT_TASKS, TokenizerRecord, light_record
from planish.optimizer.system.machine import instruction_set, library_version
from planish.optimizer.system.staging import MEASUREMENTS
from planish.optimizer.timing.roofline import Roofline

NOTHING = "nothing"
"""The origin of calibration data where no pass used statistics."""


_PASSES = {
    Checks.FULL: "compared one by one",
    Checks.OFFLOAD: f"not compared one by one: {OFFLOADED}",
    Checks.NONE: NOT_CHECKED,
}
"""How single passes were checked."""


def reference_record(job: Job, references: References | None, calibrated_on: str) -> records.ReferenceRecord:
    """How the reference was made, and what was compared with it."""
    known = {} if references is None else references.components
    inputs = "made from the signature" if job.data is None else GIVEN
    return records.ReferenceRecord(
        mode=job.checks.value,
        passes=_PASSES[job.checks],
        origin=NOT_CHECKED if references is None else job.lowered.original.description,
        inputs="none" if references is None else inputs,
        calibrated_on=calibrated_on,
        noise={name: dict(reference.noise) for name, reference in known.items()},
        exact_budget={name: str(reference.exact_budget()) for name, reference in known.items()},
    )


def target_record(built: BuiltEngine, folder: Path) -> records.TargetRecord:
    """One engine: its choice, passes, budgets and fidelity; ``folder`` is the output."""
    selection, fidelity = built.selection, built.verdict.fidelity
    place = folder / built.target.name
    return records.TargetRecord(
        target=str(built.target),
        arithmetic=built.target.arithmetic,
        shipped=selection.shipped,
        why=selection.why,
        pipelines=selection.pipelines if selection.shipped == "optimized" else {},
        passes=[
            records.PassRecord.of(name, report)
            for name, outcome in built.candidate.outcomes.items()
            for report in outcome.reports
            if report.rolled_back is None
        ],
        rolled_back=[records.RolledBack(**undone.model_dump()) for undone in selection.rolled_back],
        budgets={name: str(budget) for name, budget in built.verdict.budgets.by_name().items()},
        checked_with=fidelity.checked_with,
        comparison=records.figures(fidelity.comparison()),
        canonical_operators=dict(built.rewritten.operators),
        operators=dict(built.rewritten.shipped),
        as_loaders_open=loader_record(built),
        size_bytes=sum(path.stat().st_size for path in sorted(place.rglob("*")) if path.is_file()),
    )


def loader_record(built: BuiltEngine) -> records.LoaderRecord | None:
    """The fidelity of an engine that a loader opens without options, where that differs from what was checked."""
    fidelity, target = built.as_loaders_open, built.target.as_loaders_open()
    if fidelity is None or target is None:
        return None
    return records.LoaderRecord(
        target=str(target),
        comparison=records.figures(fidelity.comparison()),
        violations=fidelity.violations(built.verdict.budgets),
    )


def measurements_of(
    built: Sequence[BuiltEngine], stages: Stages, rooflines: Mapping[str, Mapping[str, Roofline]]
) -> dict[str, Any]:
    """Everything that may differ between two equal builds."""
    tunings = {host: answers for engine in built for host, answers in engine.tunings.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "instruction_set": instruction_set()},
        "stages_seconds": stages.seconds,
        "profile": tunings,
        "targets": {
            engine.target.name: {
                "latency_ms": {
                    shape: {kind: timing.__dict__ for kind, timing in timings.items()}
                    for shape, timings in engine.timings.items()
                },
                "roofline": {shape: line.described() for shape, line in rooflines.get(engine.target.name, {}).items()},
                "check_peak_memory_bytes": engine.verdict.fidelity.peak_memory,
                "passes": {
                    name: {report.text: report.measured for report in outcome.reports}
                    for name, outcome in engine.candidate.outcomes.items()
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


def write_output(job: Job, built: Sequence[BuiltEngine], rooflines: Mapping[str, Mapping[str, Roofline]]) -> Result:
    """Write reference, lock, measurements, report and manifest into the folder that holds the engines."""
    folder, lowered, requested = job.places.engines, job.lowered, job.request.described()
    references = None if job.references is None else job.references()
    if references is not None:
        references.save(folder / "reference")
    calibrated = any(engine.calibrated for engine in built)
    origin = origin_of_data(lowered, job.data) if calibrated else NOTHING
    lock = Lock(
        source=dict(lowered.program.provenance.files),
        requested=requested,
        calibration=digest_of_data(lowered, job.data) if calibrated else "",
        targets={engine.target.name: engine.selection for engine in built},
    )
    (folder / LOCK).write_text(lock.text(), encoding="utf-8")
    measurements = measurements_of(built, job.stages, rooflines)
    (folder / MEASUREMENTS).write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")
    write_measurements(folder, measurements)
    manifest = Manifest(
        planish=library_version("planish"),
        libraries=dict(job.libraries),
        instruction_set=instruction_set(),
        source=records.source_record(lowered.program),
        task=lowered.program.task,
        signatures={n: records.SignatureRecord.of(s) for n, s in lowered.program.signatures.items()},
        requested=requested,
        reference=reference_record(job, references, origin),
        targets={engine.target.name: target_record(engine, folder) for engine in built},
        files={},
        tokenizer=light_tokenizer(lowered),
    )
    write_sites(folder, [record for engine in built for record in engine.rewritten.sites])
    write_report(folder, manifest, lock)
    # Hashes come last: they are of every other file in the output.
    manifest = manifest.model_copy(update={"files": records.hash_files(folder)})
    manifest.write(folder)
    notes = [*job.request.replaced(lowered.program), *(note for engine in built for note in engine.notes)]
    return Result(folder, manifest, measurements, [*notes, *_notes_on_source(lowered, origin)])


def _notes_on_source(lowered: Lowered, origin: str) -> list[str]:
    """Notes on calibration data that nobody gave, and on the checkpoint."""
    generated = origin not in (NOTHING, GIVEN)
    notes = [f"calibrated on inputs {origin}, which are not like yours: give --calibration"] if generated else []
    return [*notes, *(lowered.program.provenance.notes if lowered.program.provenance.kind == "checkpoint" else ())]
