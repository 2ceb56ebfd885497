"""Verification of an output on this machine: `planish verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planish.optimizer.compilation.progress import Progress, Stages, silent
from planish.optimizer.compilation.verdicts import NOT_CHECKED
from planish.optimizer.fidelity.engine_check import check_as_loaders_open, check_engines
from planish.optimizer.fidelity.metrics import Comparison
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.fidelity.reference import References
from planish.optimizer.output import manifest as records
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.system.links import refuse_links_out
from planish.optimizer.system.machine import instruction_set
from planish.optimizer.system.staging import MADE_LATER, MANIFEST, some_of

_REFERENCE = "reference"


@dataclass(frozen=True)
class VerifiedEngine:
    """The result of `verify` for one engine."""

    target: str
    comparison: Comparison | None
    problems: tuple[str, ...]
    note: str = ""


def verify(out: str | Path, *, progress: Progress = silent) -> dict[str, VerifiedEngine]:
    """Check an output on this machine: its files and their hashes, then every engine against the stored reference.

    Returns a verdict for each engine; the caller handles problems (the command line exits with code 1). BadInput if the
    folder is not an output, or holds a link that leads outside. An engine whose runtime is missing is checked by
    another one, which is noted.
    """
    folder = Path(out)
    refuse_links_out(folder)
    manifest = Manifest.read(folder)
    broken = [name for name, digest in manifest.files.items() if records.digest_of(folder / name) != digest]
    stages, verdicts = Stages(progress, len(manifest.targets)), {}
    for name in manifest.targets:
        with stages.stage(f"{name}: check"):
            verdicts[name] = _verify(folder, name, manifest, broken)
    return verdicts


def _verify(folder: Path, name: str, manifest: Manifest, broken: Sequence[str]) -> VerifiedEngine:
    record = manifest.targets[name]
    changed = tuple(_changed(folder, (name, _REFERENCE), manifest, broken))
    if changed:
        return VerifiedEngine(record.target, None, changed)
    if not manifest.reference.noise:
        return VerifiedEngine(record.target, None, (f"it was built with --reference none, so it was {NOT_CHECKED}",))
    target = manifest.backend(name)
    references = References.load(folder / _REFERENCE, manifest.reference.noise, manifest.reference.origin)
    signatures = {component: recorded.signature() for component, recorded in manifest.signatures.items()}
    mapped = manifest.reference.mode == "offload"
    place = records.engine_folder(folder, name)
    fidelity = check_engines(target, place, signatures, references, mapped=mapped)
    compared = fidelity.comparisons.by_name()
    recorded, budgets = Parts.of_names(record.budgets), record.budgets_of(compared)
    unheld = sorted(replace(recorded, evaluation=None).by_name().keys() - compared.keys())
    problems = [*fidelity.violations(budgets), *(f"nothing holds {part} against its budget" for part in unheld)]
    default = None if mapped else target.as_loaders_open()
    here = instruction_set()
    notes = [] if here == manifest.instruction_set else [f"built on {manifest.instruction_set}, checked on {here}"]
    notes += [] if target.missing() is None else [f"checked with {fidelity.checked_with}: {target.missing()}"]
    if default is not None:
        opened = check_as_loaders_open(default, place, signatures, references).violations(budgets)
        notes.append(f"loaded without options ({default}): {'; '.join(opened) or 'within the budget'}")
    notes += ["its own measure was not taken again"] if recorded.evaluation is not None else []
    return VerifiedEngine(record.target, fidelity.comparison(), tuple(problems), "; ".join(notes))


def _changed(folder: Path, parts: Sequence[str], manifest: Manifest, broken: Sequence[str]) -> Iterator[str]:
    """Problems of the files in these folders of an output: changed files, and unlisted files, which an engine may read
    too."""
    for file in (file for file in broken if file.split("/")[0] in parts):
        yield f"{file} is {'not the file that was written' if (folder / file).exists() else 'missing'}"
    there = [file for part in parts for file in records.names_below(folder / part, folder)]
    strange = [file for file in there if file not in manifest.files and Path(file).name not in MADE_LATER]
    if strange:
        yield f"{MANIFEST} does not list {some_of(strange)}"
