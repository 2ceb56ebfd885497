"""`optimize`: source in, checked and timed engines out.

The flow: lower, make a reference, and for each target run recipes, emit, check, time and select. What was selected goes
into a lock, what was done into a manifest, what was timed into the measurements.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from planish.optimizer.calibration.data import NOT_OBSERVED, Samples
from planish.optimizer.calibration.sources import calibration_batches, digest_of_data, samples_of
from planish.optimizer.compilation.arithmetic import locked_target
from planish.optimizer.compilation.engine import build_engine
from planish.optimizer.compilation.job import Checks, Job, Places
from planish.optimizer.compilation.options import BuildOptions
from planish.optimizer.compilation.progress import LOGGER, Stages, count_stages
from planish.optimizer.compilation.references import ask_original
from planish.optimizer.compilation.request import Request, request_of
from planish.optimizer.compilation.result import Result
from planish.optimizer.compilation.rooflines import rooflines_of
from planish.optimizer.compilation.transform import Transformer
from planish.optimizer.compilation.write_output import write_output
from planish.optimizer.driver.files import check_depfile, check_places, files_read, staged_if_given, written_beside
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.lowering.checkpoint.checkpoint import sha256
from planish.optimizer.output.depfile import write_depfile
from planish.optimizer.output.lock import LOCK, Lock, located
from planish.optimizer.output.sites import Expectation, refuse_absent
from planish.optimizer.system import interrupts
from planish.optimizer.system.garbage import collecting_seldom
from planish.optimizer.system.interrupts import holding_interrupts
from planish.optimizer.system.links import file_in
from planish.optimizer.system.machine import library_versions
from planish.optimizer.system.scratch import scratch_folder, temporary
from planish.optimizer.system.staging import MANIFEST, demand_apart, staged_folder
from planish.optimizer.timing.roofline import Roofline


def optimize(source: str | Path | Any, out: str | Path, options: BuildOptions | None = None, **fields: Any) -> Result:
    """Turn a checkpoint folder, an `.onnx` file or an `nn.Module` into engines in the folder ``out``.

    ``fields`` are those of `BuildOptions`, instead of ``options`` or to change them: `optimize("bert", "out",
    preset="fast")`.

    Raises the errors of `errors.py`; whatever stood at ``out`` before stays whole unless everything succeeded.
    """
    options = replace(options or BuildOptions(), **fields)
    check_places(source, Path(out), options)
    built = written_beside(options)
    # The depfile comes last, since it names the other files with their times, but its place is claimed first.
    with staged_if_given(options.depfile) as depfile:
        result = _build(source, Path(out), options)
        if depfile is not None:
            inputs = files_read(source, result.manifest.source.files, options)
            inputs += [] if options.lock is None else [Path(options.lock)]
            # Files that this build wrote itself must not be newer than its output, or make would build again.
            write_depfile(depfile, Path(out) / MANIFEST, inputs, [path for path in built if path.is_file()])
    for note in result.notes:
        LOGGER.info(note)
    return replace(result, folder=Path(out))


def _build(source: str | Path | Any, out: Path, options: BuildOptions) -> Result:
    """Build into ``out``, and copy the lock to its place if it was not there."""
    data = samples_of(options.calibration, options.samples)
    request, expected = _request(options, data), [Expectation.parse(text) for text in options.expect]
    checks, lock = Checks(options.reference), _read_lock(source, options, request, data)
    _refuse_absent(expected, request, checks, lock)
    libraries = library_versions(registry.libraries())  # a backend of others that does not import is told of now
    stages = Stages(options.progress, _count_stages(request, checks, lock, roofline=options.roofline))
    with (
        staged_if_given(options.lock if lock is None else None) as lock_copy,
        staged_folder(out) as folder,
        scratch_folder() as scratch,
        collecting_seldom() as settle,
    ):
        with stages.stage("lowering"):
            lowered = _lower(source, options, request)
            settle()
        demand_apart(out, lowered.files(), {})  # weights of an `.onnx` may lie in OUT though the graph does not
        _check_lock(lock, options, lowered, data)
        check_depfile(source, options, lowered)
        request.check_fits(lowered.program)
        inputs, references = ask_original(lowered, request, data, checks, stages)
        job = Job(
            request=request,
            lowered=lowered,
            checks=checks,
            references=references,
            inputs=inputs,
            batches=calibration_batches(lowered, data, inputs, references),
            data=data,
            expected=expected,
            libraries=libraries,
            places=Places(folder, scratch, Path(f"{out}.failed")),
            stages=stages,
            clock=options.clock,
        )
        transformer = Transformer(job)
        built = [
            build_engine(job, target, transformer, None if lock is None else lock.targets[target.name])
            for target in request.targets
        ]
        rooflines: dict[str, dict[str, Roofline]] = {}
        if options.roofline:
            with stages.stage("roofline"):
                for number, engine in enumerate(built):
                    rooflines[engine.target.name], notes = rooflines_of(job, engine)
                    built[number] = replace(engine, notes=(*engine.notes, *notes))
        with stages.stage("report"):
            result = write_output(job, built, rooflines)
        if lock_copy is not None:
            shutil.copyfile(folder / LOCK, lock_copy)
    return result


def _request(options: BuildOptions, data: Samples | None) -> Request:
    """The request of the options; UsageError for options that exclude each other or would do nothing."""
    request = request_of(options, calibrated=bool(data))
    if options.samples is not None and not request.observes:
        raise UsageError(NOT_OBSERVED, where="--samples", advice="leave it out")
    return request


def _read_lock(source: object, options: BuildOptions, request: Request, data: Samples | None) -> Lock | None:
    """The lock, if its file exists; UsageError, before anything is lowered, if it was made for another request, for
    other files or for other calibration data."""
    if options.lock is None or not Path(options.lock).is_file():
        return None
    path = Path(options.lock)
    lock = Lock.read(path)
    lock.check_request(path, request.described(), [*map(str, request.targets)])
    for name, locked in lock.targets.items():
        with located(f"{path}, targets.{name}.opened_as"):
            locked_target(locked)
    lock.check_pipelines(path)
    if data is not None:
        lock.check_data(path, data.digest() if lock.calibration else "")
    if not isinstance(source, str | Path) or not Path(source).exists():
        return lock  # a module has no files; what does not exist is refused by lowering, with its reason
    folders = [Path(source) if Path(source).is_dir() else Path(source).parent]
    folders += [] if options.adapter is None else [Path(options.adapter)]
    files = {name: [file for folder in folders if (file := file_in(folder, name))] for name in lock.source}
    # The smallest first: a changed configuration is found before gigabytes of weights are read.
    for name in sorted(files, key=lambda name: sum(file.stat().st_size for file in files[name])):
        if not any(sha256(file) == lock.source[name] for file in files[name]):
            lock.refuse_source(path, f"{name} {'has changed' if files[name] else 'is missing'}")
    return lock


def _check_lock(lock: Lock | None, options: BuildOptions, lowered: Lowered, data: Samples | None) -> None:
    """UsageError if the lock is of another source, or of engines that were calibrated on other data; BadInput if it has
    pipelines for other components."""
    if lock is not None and options.lock is not None:
        path = Path(options.lock)
        lock.check_data(path, digest_of_data(lowered, data) if lock.calibration else "")
        lock.check_source(path, lowered.program.provenance.files)
        lock.check_components(path, lowered.program.components)


def _refuse_absent(expected: list[Expectation], request: Request, checks: Checks, lock: Lock | None) -> None:
    """UsageError if a pass is expected to fire that runs on no target."""
    runs = request.preset is None or checks is Checks.FULL or (checks is Checks.OFFLOAD and lock is not None)
    refuse_absent(expected, {t.name: request.passes_for(t) if runs else () for t in request.targets})


def _count_stages(request: Request, checks: Checks, lock: Lock | None, *, roofline: bool) -> int:
    """How many stages there will be."""
    each = count_stages(may_measure=lock is None and checks is Checks.FULL)
    return 2 + (checks is Checks.OFFLOAD) + each * len(request.targets) + roofline


def _lower(source: str | Path | Any, options: BuildOptions, request: Request) -> Lowered:
    """Lower the source; BadInput if the graph has no inputs."""
    if interrupts.watched():
        # torch makes a folder for compiled code as soon as it is imported, and nothing is compiled here.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary()))
    with holding_interrupts():
        lowered = lower(
            source,
            options.task,
            adapter=None if options.adapter is None else Path(options.adapter),
            background=options.reference == "full",
            offload=options.reference == "offload",
            last_logits=request.last_logits,
            sample_inputs=options.sample_inputs,
            dynamic_axes=options.dynamic_axes,
        ).with_fixed(request.fixed)
    if not all(signature.inputs for signature in lowered.program.signatures.values()):
        raise BadInput(
            "the graph has no inputs, and so always gives the same",
            where=str(source),
            advice="`planish opt` folds it into constants",
        )
    return lowered
