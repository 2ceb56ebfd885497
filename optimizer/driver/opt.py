"""One pipeline on one ONNX graph, without engines: `planish opt` and `planish explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.calibration.data import NOT_OBSERVED, Given, Samples
from planish.optimizer.compilation.references import file_reference, refuse_random
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.fidelity.budget import Budget, measured_metrics
from planish.optimizer.fidelity.inputs import make_inputs, quick
from planish.optimizer.fidelity.metrics import compare
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.ir import onnx_io
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.output.sites import Expectation, Rewritten, check_expectations, refuse_absent
from planish.optimizer.pipeline import instruments, presets
from planish.optimizer.pipeline.instruments import Instrument
from planish.optimizer.pipeline.pipeline import PassReport, Pipeline
from planish.optimizer.runtime.cases import thin
from planish.optimizer.system.staging import demand_not_read, staged_file


@dataclass(frozen=True)
class OptOptions:
    """Options of `planish opt`; each has the name of its option on the command line."""

    pipeline: str | None = None
    preset: str | None = None
    target: str | None = None
    """Target of the preset; by default ONNX Runtime."""
    keep: Sequence[str] = ()
    """Accuracy budget. Exact passes must also meet the noise floor."""
    print_before: bool = False
    print_after: bool = False
    print_after_change: bool = False
    check: bool = True
    """Verify and compare after each pass."""
    expect: Sequence[str] = ()
    calibration: Given | None = None
    """Calibration data (arrays by input name); by default small generated inputs."""

    def printers(self) -> list[Instrument]:
        """Instruments that print the graph."""
        printed: list[Instrument] = [instruments.PrintIR("before")] if self.print_before else []
        if self.print_after or self.print_after_change:
            printed.append(instruments.PrintIR("after" if self.print_after else "after-change"))
        return printed


def optimize_file(source: Path, out: Path, options: OptOptions) -> list[PassReport]:
    """Run a pipeline over the ONNX file ``source`` and write the result to ``out``.

    A failed check, or a failed expectation (`fuse-attention=12`), raises CheckFailed; a reproducer is written beside
    ``out``, and ``out`` is not written.
    """
    keep, calibration = options.keep, options.calibration
    if keep and not options.check:
        raise UsageError("nothing is compared, so no budget can be kept", where="--no-check", advice="leave one out")
    expectations = [Expectation.parse(text) for text in options.expect]
    name = target_name(options.target, options.pipeline)
    steps = steps_of(options.pipeline, options.preset, name, calibrated=calibration is not None)
    refuse_absent(expectations, {name: steps.passes})
    if calibration is not None and not any(step.observes for step in steps.passes):
        raise UsageError(NOT_OBSERVED, where="--calibration", advice="leave it out")
    budget = Budget.parse(keep) if keep else presets.budget(options.preset)
    lowered = lower(source).with_fixed(steps.fixed)
    budget.refuse_unmeasured(measured_metrics(lowered.program))
    # Only files can be overwritten; arrays in memory cannot.
    given = Path(calibration) if isinstance(calibration, str | Path) else None
    demand_not_read({**lowered.files(), "--calibration": given, "SOURCE": source}, files_of(out))
    watchers: list[Instrument] = [
        observing(lowered, calibration),
        instruments.Reproducer(Path(f"{out}.failed"), onnx_io.save, [f"--keep '{k}'" for k in keep]),
        *options.printers(),
        # Statistics are collected before the checks run, and costs include them.
        *(_checks(lowered, budget) if options.check else []),
        instruments.MeasureCost(),
    ]
    outcome = steps.run(lowered.program.sole()[0], watchers)
    check_expectations(expectations, [Rewritten.of(name, {"model": outcome})])
    with staged_file(out) as path:
        onnx_io.save(outcome.model, path)
    return outcome.reports


def files_of(out: Path) -> dict[str, Path]:
    """The files that are written for ``out``, by their descriptions for messages."""
    return {"-o": out, "weights of -o": out.with_name(f"{out.name}.data")}


def target_name(target: str | None, pipeline: str | None) -> str:
    """The target of a preset; UsageError if there is no preset."""
    if target is not None and pipeline is not None:
        raise UsageError("a target chooses among presets, not for a pipeline", where="--target", advice="leave it out")
    return registry.backend(target or registry.DEFAULT_TARGET).name


def observing(lowered: Lowered, calibration: Given | None = None) -> Calibrate:
    """Instrument for the statistics of an ONNX file: on given arrays, or on small generated ones."""
    signature = lowered.program.sole()[1]
    inputs = quick(make_inputs(signature)) if calibration is None else Samples.of(calibration).batches(signature, None)
    cases = list(inputs)
    return Calibrate(signature, lambda: cases, registry.interpreter().load)


def steps_of(pipeline: str | None, preset: str | None, target: str, *, calibrated: bool = False) -> Pipeline:
    """The passes of a text or of a preset; UsageError if both are given."""
    if pipeline is not None and preset is not None:
        raise UsageError("a preset and a pipeline exclude each other", advice="give one of them")
    if pipeline is None:
        pipeline = presets.pipeline_text(preset or "exact", target, calibrated=calibrated)
    return Pipeline.parse(pipeline)


def _checks(lowered: Lowered, asked: Budget) -> list[Instrument]:
    reference = file_reference(lowered)
    exact = reference.exact_budget()

    def budget_of(step: Pass) -> Budget:
        return Budget((*exact.clauses, *asked.clauses)) if step.exact else asked

    signature = lowered.program.sole()[1]
    load = registry.interpreter().load
    engine = load(lowered.program.sole()[0])
    refuse_random(lowered, engine, reference.inputs)
    outputs = [engine.run(case) for case in reference.inputs]
    moved = compare(signature, reference.inputs, reference.outputs, list(map(thin, reference.inputs, outputs)))
    violations = exact.violations(moved)
    if violations:  # converters of opsets have errors as well
        notes = "; ".join(lowered.program.provenance.notes)
        raise CheckFailed(f"reading the file moved its outputs ({notes or 'inlined'}): {'; '.join(violations)}")
    comparing = instruments.CompareEach(signature, reference.inputs, budget_of, load, outputs)
    return [comparing, instruments.VerifyEach()]
