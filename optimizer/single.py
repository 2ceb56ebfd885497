"""One graph through one pipeline, without engines: what `planish opt` and `planish explain` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from planish.optimizer import instruments, onnx_io, presets, registry
from planish.optimizer.backend import Engine
from planish.optimizer.base import Pass
from planish.optimizer.calibration import NOT_OBSERVED, Given, Samples
from planish.optimizer.checking import CHECKER
from planish.optimizer.compare import Budget, Case, compare, measured_metrics
from planish.optimizer.errors import BadInput, CheckFailed, UsageError
from planish.optimizer.graph import is_random, location_of
from planish.optimizer.instruments import Instrument
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.manifest import Manifest
from planish.optimizer.observing import Observe
from planish.optimizer.output import demand_not_read, staged_file
from planish.optimizer.pipeline import PassReport, Pipeline
from planish.optimizer.reference import Reference, make_inputs, noise_floor, quick, thin
from planish.optimizer.sites import Expectation, Rewritten, check_expectations, read_sites, refuse_absent


def optimize_file(
    source: Path,
    out: Path,
    *,
    pipeline: str | None = None,
    preset: str | None = None,
    target: str | None = None,
    keep: Sequence[str] = (),
    print_before: bool = False,
    print_after: bool = False,
    print_after_change: bool = False,
    check: bool = True,
    expect: Sequence[str] = (),
    calibration: Given | None = None,
) -> list[PassReport]:
    """Run a pipeline over the ONNX file ``source`` and write the result to ``out``.

    A failed check raises CheckFailed after a reproducer was written beside ``out``; ``out`` is then not written. So
    does an expectation (`fuse-attention=12`) that does not hold. Passes see activations on ``calibration`` (arrays by
    input name), or on small made inputs. ``target`` is whose preset it is, ONNX Runtime's if that is not said. Passes
    that are exact must keep the noise floor and ``keep``, others ``keep`` alone.
    """
    if keep and not check:
        raise UsageError("nothing is compared, so no budget can be kept", where="--no-check", advice="leave one out")
    wanted = [Expectation.parse(text) for text in expect]
    name = _target_name(target, pipeline)
    steps = _steps(pipeline, preset, name, calibrated=calibration is not None)
    refuse_absent(wanted, {name: steps.passes})
    if calibration is not None and not any(step.observes for step in steps.passes):
        raise UsageError(NOT_OBSERVED, where="--calibration", advice="leave it out")
    asked = Budget.parse(keep) if keep else presets.budget(preset)
    lowered = lower(source).with_fixed(steps.fixed)
    asked.refuse_unmeasured(measured_metrics(lowered.program))
    given = Path(calibration) if isinstance(calibration, str | Path) else None
    demand_not_read({**lowered.files(), "--calibration": given, "SOURCE": source}, files_of(out))
    watchers: list[Instrument] = [
        instruments.Reproducer(Path(f"{out}.failed"), onnx_io.save, [f"--keep '{k}'" for k in keep])
    ]
    if print_before:
        watchers.append(instruments.PrintIR("before"))
    if print_after or print_after_change:
        watchers.append(instruments.PrintIR("after" if print_after else "after-change"))
    watchers += _checks(lowered, asked) if check else []
    watchers = [observing(lowered, calibration), *watchers, instruments.Timing()]
    outcome = steps.run(lowered.program.sole()[0], watchers)
    check_expectations(wanted, [Rewritten.of(name, {"model": outcome})])
    with staged_file(out) as path:
        onnx_io.save(outcome.model, path)
    return outcome.reports


def files_of(out: Path) -> dict[str, Path]:
    """The files that an ONNX file called ``out`` is written to, by what to call them."""
    return {"-o": out, "weights of -o": out.with_name(f"{out.name}.data")}


def explain(
    source: Path,
    *,
    pipeline: str | None = None,
    preset: str | None = None,
    target: str | None = None,
) -> dict[str, Rewritten]:
    """The sites of every pass and the operators that are left, by target: of an output as it was built, or of a
    pipeline that is tried on an ONNX file, whose result is thrown away.

    UsageError if a pipeline is given for an output. ``target`` says which engine of an output, or whose preset is tried
    on a file, ONNX Runtime's if that is not said.
    """
    if source.is_dir():
        if pipeline is not None or preset is not None:
            raise UsageError("an output keeps what its own pipeline did", advice="give an .onnx file to try another")
        return _explain_output(source, target)
    name = _target_name(target, pipeline)
    lowered = lower(source)
    outcome = _steps(pipeline, preset, name).run(lowered.program.sole()[0], [observing(lowered)])
    return {name: Rewritten.of(name, {"model": outcome})}


def _explain_output(folder: Path, target: str | None) -> dict[str, Rewritten]:
    sites, manifest = read_sites(folder), Manifest.read(folder)
    if target is not None and target not in manifest.targets:
        advice = f"there are: {', '.join(manifest.targets)}"
        raise UsageError(f"this output has no engine {target!r}", where="--target", advice=advice)
    return {
        name: Rewritten(
            [record for record in sites if record.target == name],
            record.canonical_operators,
            record.operators,
        )
        for name, record in manifest.targets.items()
        if target in (None, name)
    }


def _target_name(target: str | None, pipeline: str | None) -> str:
    """The name of the target that a preset is resolved for; UsageError if there is none to resolve."""
    if target is not None and pipeline is not None:
        raise UsageError("a target chooses among presets, not for a pipeline", where="--target", advice="leave it out")
    return registry.backend(target or CHECKER).name


def observing(lowered: Lowered, calibration: Given | None = None) -> Observe:
    """What lets passes see activations of an ONNX file: on arrays that were given, or on small made ones."""
    signature = lowered.program.sole()[1]
    inputs = quick(make_inputs(signature)) if calibration is None else Samples.of(calibration).batches(signature, None)
    cases = list(inputs)
    return Observe(signature, lambda: cases, registry.backend(CHECKER).load)


def _steps(pipeline: str | None, preset: str | None, target: str, *, calibrated: bool = False) -> Pipeline:
    if pipeline is not None and preset is not None:
        raise UsageError("a preset and a pipeline exclude each other", advice="give one of them")
    if pipeline is None:
        pipeline = presets.pipeline_text(preset or "exact", target, calibrated=calibrated)
    return Pipeline.parse(pipeline)


def file_reference(lowered: Lowered) -> Reference:
    """Small made inputs of a lowered ONNX file, and what the file itself, unoptimized, makes of them."""
    signature = lowered.program.sole()[1]
    inputs = quick(make_inputs(signature))
    (component,) = lowered.program.components
    answers = lowered.original.answer({component: inputs}, 1)
    outputs = answers.outputs[component]
    precise = None if answers.precise is None else answers.precise[component]
    few = len(precise or [])
    noise = noise_floor(signature, inputs[:few], outputs[:few], precise)
    return Reference(tuple(inputs), tuple(outputs), noise, lowered.original.description)


def _refuse_random(lowered: Lowered, engine: Engine, inputs: Sequence[Case]) -> None:
    """BadInput for a graph that gives other outputs when it runs again: it draws them."""
    drawn = next((node for graph in lowered.program.sole()[0].graphs() for node in graph if is_random(node)), None)
    if drawn is None:
        return
    for case in inputs:
        first, second = thin(engine.run(case)), thin(engine.run(case))
        if not all(np.array_equal(first[name], second[name], equal_nan=True) for name in first):
            raise BadInput(
                "this draws other numbers in each run, so that nothing can be compared with them",
                where=location_of(drawn),
                advice="export the model for inference, or leave the comparison out (--no-check)",
            )


def _checks(lowered: Lowered, asked: Budget) -> list[Instrument]:
    reference = file_reference(lowered)
    exact = reference.exact_budget()

    def budget_of(step: Pass) -> Budget:
        return Budget((*exact.clauses, *asked.clauses)) if step.exact else asked

    signature = lowered.program.sole()[1]
    load = registry.backend(CHECKER).load
    engine = load(lowered.program.sole()[0])
    _refuse_random(lowered, engine, reference.inputs)
    outputs = [engine.run(case) for case in reference.inputs]
    moved = compare(signature, reference.inputs, reference.outputs, list(map(thin, outputs)))
    violations = exact.violations(moved)
    if violations:  # converters of opsets have errors as well
        notes = "; ".join(lowered.program.provenance.notes)
        raise CheckFailed(f"reading the file moved its outputs ({notes or 'inlined'}): {'; '.join(violations)}")
    comparing = instruments.CompareEach(signature, reference.inputs, budget_of, load, outputs)
    return [comparing, instruments.VerifyEach()]
