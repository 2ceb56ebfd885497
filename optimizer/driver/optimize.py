"""The way through the house: source in, checked and measured engines out.

`optimize` is the flow: lower, make a reference, and for each target run the pipeline, emit, check, measure, choose.
What was chosen goes into a lock, what was done into a manifest, what was timed into the measurements.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from planish.optimizer.calibration.data import NOT_OBSERVED, Given, Samples
from planish.optimizer.calibration.sources import calibration_batches, digest_of_data, samples_of
from planish.optimizer.compilation.engine import Builder
from planish.optimizer.compilation.progress import LOGGER, Progress, Stages, count_stages, silent
from planish.optimizer.compilation.references import ask_original
from planish.optimizer.compilation.request import ReferenceMode, Request, request_of
from planish.optimizer.compilation.result import Result
from planish.optimizer.compilation.write_output import (
    write_output,
)
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.sites import Expectation, refuse_absent
from planish.optimizer.system import interrupts
from planish.optimizer.system.interrupts import holding_interrupts
from planish.optimizer.system.scratch import scratch_folder, temporary
from planish.optimizer.system.staging import demand_apart, staged_file, staged_folder

_COLLECT_SELDOM = (200_000, 50, 1_000)
"""Thresholds of the collector while tracing: a twentieth of its time goes into looking at what stays."""


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
    data = samples_of(calibration, samples)
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
            result = write_output(folder, builder, built, data, reference)
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
    inputs, references = ask_original(lowered, request, data, reference, stages)
    batches = calibration_batches(lowered, data, inputs, references)
    return Builder(request, lowered, references, inputs, batches, *places, stages, reference == "offload")


def _check_lock(
    known: Lock | None, path: str | Path | None, lowered: Lowered, request: Request, data: Samples | None
) -> None:
    """UsageError if the lock that is used, if one is, was written for another source, request or set of targets, or if
    its engines were calibrated on other data."""
    if known is not None and path is not None:
        known.check_data(Path(path), digest_of_data(lowered, data) if known.calibration else "")
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
    ):  # torch makes a folder for what it compiles as soon as it is imported, and we compile empty_cache
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
