"""What watches a pipeline run: observers that see a model before and after each pass, and when one fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import onnx_ir as ir

from planish.optimizer.errors import CheckFailed, OutOfResources, PlanishError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.metrics import Comparison, compare
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.optimizer.ir.program import Arrays, Signature
from planish.optimizer.ir.verifier import faults_of, verify
from planish.optimizer.ir.weightless import without_weights
from planish.optimizer.system.machine import peak_memory


@dataclass
class Step:
    """One pass in the middle of a run, as instruments see it."""

    pass_: Pass
    rest: str
    """Text of this pass and of all that follow it."""
    before: ir.Model
    """The model as it was, for comparison and for rolling back; shares its tensors with ``model``."""
    model: ir.Model
    result: PassResult = field(init=False)
    comparison: Comparison | None = None
    measured: dict[str, float] = field(default_factory=dict)
    failure: CheckFailed | None = None
    vetted: bool = False
    """Whether it is known already, from more cases than `CompareEach` has, that the model stays within its budget."""
    innocent: bool = False
    """True if the original failed, which was waited for meanwhile, and not the pass."""

    def __post_init__(self) -> None:
        """Until the pass has run, its result is: nothing."""
        self.result = PassResult(self.model, modified=False)


class Instrument:
    """Base of all observers; each hook does nothing unless overridden. `after` may raise CheckFailed."""

    def before(self, step: Step) -> None:
        """Called before the pass runs."""

    def after(self, step: Step) -> None:
        """Called when the pass has run; `step.result` says what it did."""

    def failed(self, step: Step, error: Exception) -> None:
        """Called when the pass, or an instrument after it, raised."""


class VerifyEach(Instrument):
    """Check after each pass that the structure is not worse than it was, and that "unchanged" was the truth."""

    def before(self, step: Step) -> None:
        """Remember what the graph looks like."""
        self._text = fingerprint(step.model)

    def after(self, step: Step) -> None:
        """CheckFailed if the graph is broken, or changed although the pass said it did not."""
        if not step.result.modified:
            if fingerprint(step.model) != self._text:
                raise CheckFailed(f"{step.pass_.name} said it changed nothing, but the graph is different")
            return
        try:
            verify(step.model)
        except CheckFailed as error:
            if _messages(step.model) <= _messages(step.before):
                return
            raise CheckFailed(f"{step.pass_.name}: {error.what}", picture=error.picture) from None


def _messages(model: ir.Model) -> set[str]:
    """What is wrong with a graph. The standard's shape inference refuses some operators that are as they should be."""
    return {fault.message for fault in faults_of(model)}


class CompareEach(Instrument):
    """Run the component before and after each pass that changed it, and hold the difference against a budget."""

    def __init__(
        self,
        signature: Signature,
        inputs: Sequence[Arrays],
        budget_of: Callable[[Pass], Budget],
        load: Callable[[ir.Model], Engine],
        outputs: Sequence[Arrays] | None = None,
    ) -> None:
        """``outputs`` are those of the model before the first pass, if they are known already."""
        self.signature = signature
        self.inputs = inputs
        self.budget_of = budget_of
        self.load = load
        self._outputs = outputs
        self._engine: Engine | None = None

    def after(self, step: Step) -> None:
        """CheckFailed if the pass moved an output further than the budget of that pass allows."""
        if not step.result.modified:
            return
        try:  # first: it may wait for the original, whose memory is then gone
            budget = self.budget_of(step.pass_)
        except Exception:
            step.innocent = True
            raise
        if self._outputs is None:
            self._outputs = self._run(step.before)
        after = self._run_changed(step)
        step.comparison = compare(self.signature, self.inputs, self._outputs, after)
        violations = budget.violations(step.comparison)
        if violations and not step.vetted:
            raise CheckFailed(f"{step.pass_.name} moved the outputs: {'; '.join(violations)}")
        self._outputs = after

    def _run_changed(self, step: Step) -> Sequence[Arrays]:
        try:
            return self._run(step.model)
        except CheckFailed as error:
            raise CheckFailed(f"{step.pass_.name} left a graph that does not run: {error.what}") from error

    def _run(self, model: ir.Model) -> Sequence[Arrays]:
        self._engine = self.load(model)  # kept: the next engine then finds the weights that both share still in memory
        return [self._engine.run(case) for case in self.inputs]


class MeasureCost(Instrument):
    """Seconds of each pass, and the growth of this process's peak memory while it ran."""

    def before(self, step: Step) -> None:
        """Start the clock."""
        self._memory = peak_memory()
        self._start = time.perf_counter()

    def after(self, step: Step) -> None:
        """Stop it."""
        step.measured["seconds"] = time.perf_counter() - self._start
        step.measured["peak_memory_growth_bytes"] = float(peak_memory() - self._memory)


class PrintIR(Instrument):
    """Print the graph as text before passes, after them, or after those that changed it."""

    def __init__(
        self, when: Literal["before", "after", "after-change"], only: str | None = None, file: TextIO | None = None
    ) -> None:
        self.when = when
        self.only = only
        self.file = file

    def before(self, step: Step) -> None:
        """Print, if asked to before."""
        if self.when == "before":
            self._print(step, "before")

    def after(self, step: Step) -> None:
        """Print, if asked to after."""
        if self.when == "after" or (self.when == "after-change" and step.result.modified):
            self._print(step, "after")

    def _print(self, step: Step, moment: str) -> None:
        if self.only in (None, step.pass_.name):
            print(f"// {moment} {step.pass_}\n{text_of(step.model)}", file=self.file or sys.stderr)


class Reproducer(Instrument):
    """When a pass fails, keep what is needed to see it fail again: the model before it, and one command.

    ``save`` writes a model to a file; it is handed in because only backends and the driver write models.
    """

    def __init__(
        self,
        folder: Path,
        save: Callable[[ir.Model, Path], None],
        options: Sequence[str] = (),
        *,
        bugs_only: bool = False,
    ) -> None:
        self.folder = folder
        self.save = save
        self.options = options
        self.bugs_only = bugs_only
        """Leave alone a pass that is not exact and only missed the fidelity that was asked for."""
        self.commands: list[str] = []

    def failed(self, step: Step, error: Exception) -> None:
        """Write `before.onnx`, the remaining pipeline and the command; put the command into the error."""
        if step.innocent or isinstance(error, OSError | MemoryError | OutOfResources):
            return  # the original or the machine failed, not the pass, and there may be no room for a reproducer
        if self.bugs_only and isinstance(error, CheckFailed) and not step.pass_.exact:
            return
        folder = self.folder / step.pass_.name
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "before.onnx"
        self.save(step.before, model)
        options = " ".join(self.options)
        command = f"planish opt {model} --pipeline '{step.rest}' -o {folder / 'after.onnx'} {options}".strip()
        (folder / "command.txt").write_text(f"{command}\n# {error}\n", encoding="utf-8")
        self.commands.append(command)
        if isinstance(error, PlanishError):
            error.advice = f"reproduce with: {command}"


def text_of(model: ir.Model) -> str:
    """The graph as ONNX text, weights left out."""
    return ir.to_onnx_text(without_weights(model, limit=16))


def fingerprint(model: ir.Model) -> str:
    """A text that differs if the model does: structure, attributes, and which tensors it holds."""
    tensors = [id(value.const_value) for graph in model.graphs() for value in graph.initializers.values()]
    return f"{sorted(model.opset_imports.items())} {tensors} {text_of(model)}"
