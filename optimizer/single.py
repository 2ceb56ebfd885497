"""One graph through one pipeline, without engines: what `planish opt` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planish.optimizer import instruments, onnx_io, presets, registry
from planish.optimizer.base import Pass
from planish.optimizer.building import CHECKER
from planish.optimizer.compare import Budget
from planish.optimizer.instruments import Instrument
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.output import staged_file
from planish.optimizer.pipeline import PassReport, Pipeline
from planish.optimizer.reference import Reference, make_inputs, noise_floor, quick


def optimize_file(
    source: Path,
    out: Path,
    *,
    pipeline: str | None = None,
    preset: str | None = None,
    target: str = "onnxruntime",
    keep: Sequence[str] = (),
    print_before: bool = False,
    print_after: bool = False,
    print_after_change: bool = False,
    check: bool = True,
) -> list[PassReport]:
    """Run a pipeline over the ONNX file ``source`` and write the result to ``out``.

    A failed check raises CheckFailed after a reproducer was written beside ``out``; ``out`` is then not written.
    """
    name = registry.backend(target).name
    steps = Pipeline.parse(pipeline if pipeline is not None else presets.pipeline_text(preset or "exact", name))
    asked = Budget.parse(keep) if keep else presets.budget(preset)
    lowered = lower(source)
    watchers: list[Instrument] = [
        instruments.Reproducer(Path(f"{out}.failed"), onnx_io.save, [f"--keep '{k}'" for k in keep])
    ]
    if print_before:
        watchers.append(instruments.PrintIR("before"))
    if print_after or print_after_change:
        watchers.append(instruments.PrintIR("after" if print_after else "after-change"))
    watchers += _checks(lowered, asked) if check else []
    outcome = steps.run(lowered.program.sole()[0], [*watchers, instruments.Timing()])
    with staged_file(out) as path:
        onnx_io.save(outcome.model, path)
    return outcome.reports


def _checks(lowered: Lowered, asked: Budget) -> list[Instrument]:
    signature = lowered.program.sole()[1]
    inputs = quick(make_inputs(signature))
    (component,) = lowered.program.components
    answers = lowered.original.answer({component: inputs}, 1)
    outputs = answers.outputs[component]
    precise = None if answers.precise is None else answers.precise[component]
    few = len(precise or [])
    noise = noise_floor(signature, inputs[:few], outputs[:few], precise)
    exact = Reference(tuple(inputs), tuple(outputs), noise, lowered.original.description).exact_budget()

    def budget_of(step: Pass) -> Budget:
        return exact if step.exact else asked

    compare = instruments.CompareEach(signature, inputs, budget_of, registry.backend(CHECKER).load)
    return [compare, instruments.VerifyEach()]
