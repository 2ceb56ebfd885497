"""The way through the house: source in, checked and measured engines out.

`optimize` is the flow: lower, make a reference, and for each target run the pipeline, emit, check, measure, choose.
What was chosen goes into a lock, what was done into a manifest, what was timed into the measurements.
"""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from planish.optimizer import interrupts, registry
from planish.optimizer import manifest as records
from planish.optimizer.backend import Arrays, Engine
from planish.optimizer.building import Builder, Built, count_stages
from planish.optimizer.calibration import NOT_OBSERVED, Given, Samples, one_behind_the_other
from planish.optimizer.checking import CHECKER, demand_room
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.generate import Decoding
from planish.optimizer.graph import weight_bytes
from planish.optimizer.interrupts import holding_interrupts
from planish.optimizer.lock import LOCK, Lock
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.lowering.original import Answers
from planish.optimizer.lowering.tokenizer import load_tokenizer
from planish.optimizer.manifest import Manifest
from planish.optimizer.output import MEASUREMENTS, demand_apart, staged_file, staged_folder
from planish.optimizer.program import Signature
from planish.optimizer.recording import (
    GIVEN,
    NOTHING,
    ReferenceMode,
    measurements_of,
    reference_record,
    target_record,
)
from planish.optimizer.reference import Reference, References, make_inputs, make_prompts, noise_floor
from planish.optimizer.rehearsal import Rehearsal
from planish.optimizer.report import write_report
from planish.optimizer.request import Request, request_of
from planish.optimizer.scratch import scratch_folder, temporary
from planish.optimizer.sites import Expectation, refuse_absent, write_sites
from planish.optimizer.stages import LOGGER, Progress, Stages, silent
from planish.optimizer.tokenizing import LIGHT_TASKS, TokenizerRecord, light_record

_PRECISE_CASES = 1
"""The noise floor is estimated on this many of the first reference cases: made ones begin with a small padded batch."""
_COLLECT_SELDOM = (200_000, 50, 1_000)
"""Thresholds of the collector while tracing: a twentieth of its time goes into looking at what stays."""


@dataclass(frozen=True)
class Result:
    """A finished output folder."""

    folder: Path
    manifest: Manifest
    measurements: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    """What to read after the build: an exact pass that was undone, and how to reproduce it."""

    @functools.cached_property
    def engines(self) -> dict[str, Engine]:
        """The engines that this machine can open, by the name of their folder."""
        targets = {name: registry.backend(record.target) for name, record in self.manifest.targets.items()}
        if list(self.manifest.signatures) != ["model"]:
            raise UsageError("these engines have several components", advice="use result.decoding(name)")
        return {n: target.open(self.folder / n) for n, target in targets.items() if target.missing() is None}

    def decoding(self, name: str) -> Decoding:
        """The engine in the folder ``name``, ready to go on with texts token by token."""
        return Decoding.of(
            registry.backend(self.manifest.targets[name].target), self.folder / name, self.manifest.signatures
        )


def optimize(
    source: str | Path | Any,
    out: str | Path,
    *,
    task: str | None = None,
    targets: Sequence[str] = ("onnxruntime",),
    preset: str | None = None,
    pipeline: str | None = None,
    calibration: Given | None = None,
    samples: int | None = None,
    keep: Sequence[str] = (),
    evaluate: str | None = None,
    shapes: Sequence[Mapping[str, int]] = (),
    fix: Mapping[str, int] | None = None,
    expect: Sequence[str] = (),
    profile: str | Path | None = None,
    lock: str | Path | None = None,
    adapter: str | Path | None = None,
    reference: ReferenceMode = "full",
    logits: Literal["all", "last"] = "all",
    sample_inputs: Mapping[str, Any] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    progress: Progress = silent,
) -> Result:
    """Turn a checkpoint folder, an `.onnx` file or an `nn.Module` into engines in the folder ``out``.

    ``preset`` (`exact` by default) and ``pipeline`` exclude each other. ``calibration`` are the user's own inputs: a
    file of texts or arrays, or an iterable of them; the first are held against, ``samples`` more (256) calibrated on.
    ``keep`` are budgets (`cosine>=0.999`); ``evaluate`` is a command that is given an engine's folder and prints a
    number on its last line, for budgets `score>=0.9` or, as a multiple of the plain engine's, `score>=0.99x`.
    ``shapes`` sizes of axes at which engines are timed, ``fix`` sizes that axes always have (`{"sequence": 128}`).
    ``expect`` is how often a pass must fire on every target (`fuse-attention=12`). ``profile`` is a file of what the
    targets run fast: presets choose by it, and what it lacks is measured. ``lock`` is used if the file exists and
    written if it does not. ``adapter`` is the folder of a PEFT adapter that is merged into a checkpoint.
    ``reference`` "offload" is for a checkpoint that does not fit into memory: its weights, and those of the engines,
    are read from their files as they are used; engines are compared with it, single passes are not, nothing is timed,
    and a preset ships the plain lowering. With "none" the original is never run, and nothing is compared either. The
    manifest says so. With ``logits`` "last" a decoder gives the scores behind the last token alone, (batch, 1,
    vocabulary): what writing needs, and less work for a prompt. A module needs ``sample_inputs`` (tensors by keyword)
    and ``dynamic_axes`` (`{input: {position: name}}`). ``progress`` is called as each stage begins.

    Raises the errors of `errors.py`; whatever stood at ``out`` before stays whole unless everything succeeded.
    """
    data = _data(calibration, samples)
    request = request_of(
        targets,
        preset,
        pipeline,
        keep,
        shapes,
        fix,
        profile,
        evaluate,
        logits,
        calibrated=bool(data),
        reference=reference,
    )
    if samples is not None and not request.observes:
        raise UsageError(NOT_OBSERVED, where="--samples", advice="leave it out")
    wanted = [Expectation.parse(text) for text in expect]
    known = Lock.read(Path(lock)) if lock is not None and Path(lock).is_file() else None
    runs = request.preset is None or reference == "full" or (reference == "offload" and known is not None)
    refuse_absent(wanted, {t.name: request.passes_for(t) if runs else () for t in request.targets})
    stages = Stages(progress, _count(request, known, reference))
    with staged_folder(_apart(out, source, adapter, calibration, profile, lock)) as folder, scratch_folder() as scratch:
        with stages.stage("lowering"):
            lowered = _lowered(request, source, task, adapter, reference, sample_inputs, dynamic_axes)
        demand_apart(Path(out), lowered.files(), {})  # weights of an `.onnx` may lie in OUT though the graph does not
        _check_lock(known, lock, lowered, request, data)
        request.check_fits(lowered.program)
        builder = _builder(request, lowered, data, reference, (folder, scratch, Path(f"{out}.failed")), stages)
        builder.expected, builder.notes = wanted, request.replaced(lowered.program)
        built = [builder.build(t, None if known is None else known.targets[t.name]) for t in request.targets]
        with stages.stage("report"):
            result = _write(folder, builder, built, data, reference)
    if lock is not None and known is None:
        _copy_text(Path(out) / LOCK, Path(lock))
    return _told(replace(result, folder=Path(out)))


def _told(result: Result) -> Result:
    """The same, when its notes are in the log."""
    for note in result.notes:
        LOGGER.info(note)
    return result


def _apart(out: str | Path, source: object, *others: object) -> Path:
    """The output folder, which neither holds what is read, or written beside it, nor lies in it."""
    source, adapter, calibration, profile, lock = (
        Path(given) if isinstance(given, str | Path) else None for given in (source, *others)
    )
    read = {"source": source, "--adapter": adapter, "--calibration": calibration}
    demand_apart(Path(out), read, {"--profile": profile, "--lock": lock})
    return Path(out)


def _count(request: Request, known: Lock | None, reference: ReferenceMode) -> int:
    """How many stages there will be."""
    each = count_stages(may_measure=known is None and reference == "full")
    return 2 + (reference == "offload") + each * len(request.targets)


def _copy_text(source: Path, place: Path) -> None:
    with staged_file(place) as path:
        path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


def _builder(
    request: Request,
    lowered: Lowered,
    data: Samples | None,
    reference: ReferenceMode,
    places: tuple[Path, Path, Path],
    stages: Stages,
) -> Builder:
    """What builds the engines; the original is asked for its answers from now on."""
    inputs, references = _asked(lowered, request, data, reference, stages)
    batches = _batches(lowered, data, inputs, references)
    return Builder(request, lowered, references, inputs, batches, *places, stages, reference == "offload")


def _data(calibration: Given | None, samples: int | None) -> Samples | None:
    """The user's own inputs, if there are any; UsageError if only their number is given."""
    if calibration is None and samples is not None:
        raise UsageError("samples of nothing were asked for", where="--samples", advice="give --calibration")
    return None if calibration is None else Samples.of(calibration, samples)


def _digest(lowered: Lowered, data: Samples | None) -> str:
    """What tells calibration data from others, for a lock."""
    return _origin(lowered, data) if data is None else data.digest()


def _check_lock(
    known: Lock | None, path: str | Path | None, lowered: Lowered, request: Request, data: Samples | None
) -> None:
    """UsageError if the lock that is used, if one is, was written for another source, request or set of targets, or if
    its engines were calibrated on other data."""
    if known is not None and path is not None:
        known.check_data(Path(path), _digest(lowered, data) if known.calibration else "")
        files = lowered.program.provenance.files
        known.check_fits(Path(path), files, request.described(), [*map(str, request.targets)])


def _lowered(
    request: Request,
    source: str | Path | Any,
    task: str | None,
    adapter: str | Path | None,
    reference: ReferenceMode,
    sample_inputs: Mapping[str, Any] | None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None,
) -> Lowered:
    """Lower, and spare the collector the objects of torch: few die meanwhile, and a million stay as they are after."""
    if (
        interrupts.watched()
    ):  # torch makes a folder for what it compiles as soon as it is imported, and we compile nothing
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary()))
    usual = gc.get_threshold()
    gc.set_threshold(*_COLLECT_SELDOM)
    with holding_interrupts():  # also while the collector runs below, out of which no exception gets
        try:
            lowered = lower(
                source,
                task,
                adapter=None if adapter is None else Path(adapter),
                background=reference == "full",
                offload=reference == "offload",
                last_logits=request.last_logits,
                sample_inputs=sample_inputs,
                dynamic_axes=dynamic_axes,
            ).with_fixed(request.fixed)
        finally:
            gc.set_threshold(*usual)
        gc.collect()
        gc.freeze()
    if not all(signature.inputs for signature in lowered.program.signatures.values()):
        raise BadInput(
            "the graph has no inputs, and so always gives the same",
            where=str(source),
            advice="`planish opt` folds it into constants",
        )
    return lowered


def _asked(
    lowered: Lowered, request: Request, data: Samples | None, reference: ReferenceMode, stages: Stages
) -> tuple[dict[str, list[Arrays]], Callable[[], References] | None]:
    """Reference inputs, and the function that waits for the original's outputs; nothing if it shall not run.

    With `offload` it answers now: two who read all weights at once would need twice the memory.
    """
    if reference == "none":
        return {}, None
    if reference == "offload" and request.preset is not None:  # before anything is read
        plain = max(weight_bytes(model) for model in lowered.program.components.values())
        for target in request.targets:
            demand_room(target, plain)
    inputs = _inputs(lowered, data)
    references = _references(lowered, inputs)
    if reference == "offload":
        with stages.stage("reference"):
            references()
    return inputs, references


def _inputs(lowered: Lowered, data: Samples | None) -> dict[str, list[Arrays]]:
    """Reference inputs by component: the user's, and the longest that the signature allows; or all from the signature.

    The user's are for the component that takes texts, which is the first.
    """
    made: dict[str, list[Arrays]] = {
        name: list(make_inputs(signature)) for name, signature in lowered.program.signatures.items()
    }
    if data is None:
        return made
    first, signature = next(iter(lowered.program.signatures.items()))
    given = data.reference(signature, _tokenizer(lowered))
    return made | {first: [*given, one_behind_the_other(given, made[first][-1], signature)]}


def _tokenizer(lowered: Lowered) -> Any | None:
    return None if lowered.folder is None else load_tokenizer(lowered.folder)


def _light(lowered: Lowered) -> TokenizerRecord | None:
    """How `run` reads the tokenizer without transformers, if it can."""
    if lowered.folder is None or lowered.program.task not in LIGHT_TASKS:
        return None
    try:
        tokenizer = _tokenizer(lowered)
    except BadInput:  # engines are built without a tokenizer too; `run` says what is wrong with it
        return None
    return None if tokenizer is None else light_record(tokenizer, lowered.folder)


def _batches(
    lowered: Lowered,
    data: Samples | None,
    inputs: Mapping[str, Sequence[Arrays]],
    references: Callable[[], References] | None,
) -> dict[str, Callable[[], Iterable[Arrays]]]:
    """What each component is calibrated on: the user's data, or what the model writes itself, or its reference inputs.

    The user's data are for the component that takes texts, which is the first; the others overhear how it goes on.
    """
    signatures = lowered.program.signatures
    made = {name: list(inputs.get(name) or make_inputs(own)) for name, own in signatures.items()}
    found: dict[str, Callable[[], Iterable[Arrays]]] = {n: functools.partial(iter, own) for n, own in made.items()}
    first, signature = next(iter(signatures.items()))
    if data is not None:
        if not inputs:  # nobody has looked at them yet
            data.reference(signature, _tokenizer(lowered))
        found[first] = functools.partial(_given, data, signature, _tokenizer(lowered), made[first][-1])
    if lowered.program.generates and references is not None:
        rehearsal = Rehearsal(lowered.program.components, registry.backend(CHECKER).load)
        if signature.cached and data is None:
            found[first] = functools.partial(rehearsal.texts, signature)
        for name in [name for name in signatures if name != first]:
            found[name] = functools.partial(_overheard, rehearsal, name, found[first], references)
    return found


def _given(data: Samples, signature: Signature, tokenizer: Any | None, longest: Arrays) -> Iterable[Arrays]:
    """The user's data, and the longest input that there is with their tokens in it: engines are asked for that too."""
    kept: list[Arrays] = []
    for batch in data.batches(signature, tokenizer):
        if sum(case[next(iter(case))].size for case in kept) < longest[next(iter(longest))].size:
            kept.append(batch)
        yield batch
    joined = one_behind_the_other(kept, longest, signature)
    if joined is not longest:
        yield joined


def _origin(lowered: Lowered, data: Samples | None) -> str:
    """What calibration data are, in a few words."""
    writes = lowered.program.generates and next(iter(lowered.program.signatures.values())).cached
    return GIVEN if data is not None else "written by the model itself" if writes else "made from the signature"


def _overheard(
    rehearsal: Rehearsal,
    name: str,
    prompts: Callable[[], Iterable[Arrays]],
    references: Callable[[], References],
) -> Iterable[Arrays]:
    return rehearsal.parts(name, prompts(), references().continuations[0].start[0])


def _references(lowered: Lowered, inputs: Mapping[str, Sequence[Arrays]]) -> Callable[[], References]:
    """Start the original on the inputs; the function that is returned waits for it once."""
    first = next(iter(lowered.program.signatures.values()))
    prompts = make_prompts(first) if lowered.program.generates else []
    finish = lowered.original.start(inputs, _PRECISE_CASES, prompts)

    @functools.cache
    def references() -> References:
        answers = finish()
        found = {name: _reference(lowered, name, own, answers) for name, own in inputs.items()}
        return References(found, tuple(answers.continuations))

    return references


def _refuse_infinite(outputs: Sequence[Arrays], where: str) -> None:
    """BadInput for an output without a finite number in any case: engines that give none either would be equal."""
    for name in outputs[0]:
        arrays = [case[name] for case in outputs if case[name].dtype.kind == "f"]
        if arrays and not any(np.isfinite(array).any() for array in arrays):
            raise BadInput(
                f"the original gives no finite number for {name!r}, whatever goes in",
                where=where,
                advice="its weights or its configuration are broken: run it in PyTorch",
            )


def _reference(lowered: Lowered, component: str, inputs: Sequence[Arrays], answers: Answers) -> Reference:
    outputs = answers.outputs[component]
    if lowered.program.provenance.kind != "onnx":  # a file may have an output that is infinite for made-up inputs
        _refuse_infinite(outputs, f"{lowered.program.provenance.architecture}, {component}")
    precise = None if answers.precise is None else answers.precise[component]
    few = 0 if precise is None else len(precise)
    noise = noise_floor(lowered.program.signatures[component], inputs[:few], outputs[:few], precise)
    return Reference(tuple(inputs), tuple(outputs), noise, lowered.original.description)


def _write(folder: Path, builder: Builder, built: Sequence[Built], data: Samples | None, mode: ReferenceMode) -> Result:
    """Write reference, lock, measurements, report and manifest into a folder that holds the engines."""
    request, lowered = builder.request, builder.lowered
    references = None if builder.references is None else builder.references()
    if references is not None:
        references.save(folder / "reference")
    calibrated = builder.calibrated(built)
    origin = _origin(lowered, data) if calibrated else NOTHING
    choices = {engine.target.name: engine.choice for engine in built}
    source = dict(lowered.program.provenance.files)
    digest = _digest(lowered, data) if calibrated else ""
    locked = Lock(source=source, requested=request.described(), calibration=digest, targets=choices)
    (folder / LOCK).write_text(locked.text(), encoding="utf-8")
    measurements = measurements_of(built, builder.stages, builder.profiles)
    (folder / MEASUREMENTS).write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")
    manifest = Manifest(
        planish=records.library_version("planish"),
        libraries=records.library_versions(),
        instruction_set=records.instruction_set(),
        source=records.source_record(lowered.program),
        task=lowered.program.task,
        signatures={n: records.SignatureRecord.of(s) for n, s in lowered.program.signatures.items()},
        requested=request.described(),
        reference=reference_record(lowered, references, origin, data, mode),
        targets={engine.target.name: target_record(engine, folder) for engine in built},
        files={},
        tokenizer=_light(lowered),
    )
    write_sites(folder, [record for engine in built for record in engine.rewritten.sites])
    write_report(folder, manifest, locked)
    manifest = manifest.model_copy(update={"files": records.hash_files(folder)})
    manifest.write(folder)
    made_up = origin not in (NOTHING, GIVEN)
    told = [f"calibrated on inputs {origin}, which are not like yours: give --calibration"] if made_up else []
    told += lowered.program.provenance.notes if lowered.program.provenance.kind == "checkpoint" else ()
    return Result(folder, manifest, measurements, [*builder.notes, *told])
