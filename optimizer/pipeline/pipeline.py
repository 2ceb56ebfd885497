"""A list of passes: its text form, and the loop that runs it.

>>> from planish.optimizer import Pipeline
>>> str(Pipeline.parse("fold-constants{limit=64},remove-unused-nodes,"))
'fold-constants{limit=64},remove-unused-nodes'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.fidelity.metrics import Comparison
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal
from planish.optimizer.ir.annotations import Annotations
from planish.optimizer.ir.graph import operators_of, weight_bytes
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import Instrument, Step

_LEGALIZING = "legalize-"
OnFailure = Literal["raise", "rollback"]
"""Effect of a failed check: the run ends, or the model before that pass is restored."""


@dataclass
class PassReport:
    """Report of one pass on one component. Everything except `measured` is deterministic."""

    name: str
    text: str
    modified: bool = False
    sites: Sequence[str] = ()
    refusals: Sequence[Refusal] = ()
    facts: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    nodes: tuple[int, int] = (0, 0)
    """Number of nodes before and after."""
    operators: tuple[Mapping[str, int], Mapping[str, int]] = dataclasses.field(default_factory=lambda: ({}, {}))
    """Number of nodes by operator, before and after."""
    weight_bytes: tuple[int, int] = (0, 0)
    """Bytes of initializers before and after."""
    comparison: Comparison | None = None
    """Change of the outputs by this pass, if it was measured."""
    rolled_back: str | None = None
    """Reason for rolling the model back to its state before this pass."""
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds and bytes of peak memory, which differ between runs."""


@dataclass
class Outcome:
    """The model after a pipeline, and one report per pass."""

    model: ir.Model
    reports: list[PassReport]

    @property
    def applied(self) -> Pipeline:
        """The passes that were not rolled back, in order."""
        return Pipeline.parse(",".join(report.text for report in self.reports if report.rolled_back is None))

    @property
    def canonical(self) -> Mapping[str, int]:
        """Number of nodes by operator before the first legalization pass (`legalize-…`)."""
        legalizing = next((report for report in self.reports if report.name.startswith(_LEGALIZING)), None)
        return operators_of(self.model) if legalizing is None else legalizing.operators[0]


@dataclass(frozen=True)
class Pipeline:
    """An immutable sequence of passes."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read `a,b{option=value},c`. UsageError lists all unknown names at once, or marks the syntax error."""
        specs = option_text.parse(text, what="pipeline")
        registered = registry.table(registry.PASSES)
        unknown = [spec for spec in specs if spec.name not in registered]
        if unknown:
            raise UsageError(
                "unknown pass "
                + ", ".join(f"{bad.name!r}{option_text.did_you_mean(bad.name, registered)}" for bad in unknown),
                picture=option_text.point_at(text, unknown[0].column),
            )
        return cls(tuple(registry.pass_class(spec.name).from_options(spec.options) for spec in specs))

    @classmethod
    def preset(cls, name: str, target: str) -> Pipeline:
        """The pipeline of a preset for a target (name without options); UsageError for unknown names."""
        return cls.parse(presets.pipeline_text(name, target))

    @property
    def fixed(self) -> Mapping[str, int]:
        """Static sizes of axes that the passes set."""
        return {axis: size for step in self.passes for axis, size in step.fixed.items()}

    def __str__(self) -> str:
        """The text form; `parse` of it gives an equal pipeline."""
        return ",".join(map(str, self.passes))

    def run(
        self,
        model: ir.Model | Any,
        instruments: Iterable[Instrument] = (),
        *,
        on_failure: OnFailure = "raise",
    ) -> Outcome:
        """Run the passes in order over ``model`` (an onnx_ir model, changed in place, or an ONNX ModelProto).

        Instruments are nested: `before` runs in the given order, `after` and `failed` in reverse. A failed check raises
        CheckFailed, or, with ``on_failure="rollback"``, the model before the pass is restored and the run continues.
        Other exceptions of a pass propagate after `failed` of the instruments.
        """
        model = model if isinstance(model, ir.Model) else ir.from_proto(model)
        watchers = list(instruments)
        annotations = Annotations.of(model)
        reports: list[PassReport] = []
        before: ir.Model | None = None
        for position in range(len(self.passes)):
            step = Step(self.passes[position], str(Pipeline(self.passes[position:])), before or model.clone(), model)
            report = _run_step(step, watchers)
            if step.failure is not None and on_failure == "raise":
                raise step.failure
            model = step.before if step.failure is not None else model
            # An unchanged model needs no second clone for the next step.
            before = None if step.failure is not None or report.modified else step.before
            reports.append(report)
        # Converters and library passes drop names, shapes and documentation of inputs and outputs.
        annotations.restore(model)
        return Outcome(model, reports)


def _run_step(step: Step, watchers: Sequence[Instrument]) -> PassReport:
    """Run one pass with its instruments. A failed check is stored in `step.failure`; other exceptions propagate."""
    try:
        for watcher in watchers:
            watcher.before(step)
        result = step.pass_(step.model)
        step.result = result if isinstance(result, PassResult) else PassResult(result.model, result.modified)
        # Reverse order nests instruments: the first one sees the effects of all others.
        for watcher in reversed(watchers):
            watcher.after(step)
    except Exception as error:
        for watcher in reversed(watchers):
            watcher.failed(step, error)
        if not isinstance(error, CheckFailed):
            raise
        step.failure = error
    return _report(step)


def _report(step: Step) -> PassReport:
    result = step.result
    after = step.before if step.failure is not None else step.model
    before, operators = operators_of(step.before), operators_of(after)
    return PassReport(
        name=step.pass_.name,
        text=str(step.pass_),
        modified=result.modified if step.failure is None else False,
        sites=result.sites,
        refusals=result.refusals,
        facts=result.facts,
        nodes=(sum(before.values()), sum(operators.values())),
        operators=(before, operators),
        weight_bytes=(weight_bytes(step.before), weight_bytes(after)),
        comparison=step.comparison,
        rolled_back=None if step.failure is None else step.failure.what,
        measured=step.measured,
    )
