"""Instruments of a pipeline: observers that run before and after each pass, and on failure."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import onnx_ir as ir

from planish.optimizer.errors import CheckFailed, OutOfResources, PlanishError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.metrics import Comparison, compare
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.optimizer.ir.graph import sizes_of
from planish.optimizer.ir.program import Arrays, Signature
from planish.optimizer.ir.verifier import faults_of, verify
from planish.optimizer.ir.weightless import without_weights
from planish.optimizer.system.machine import peak_memory


@dataclass
class Step:
    """One pass during a run, as instruments see it."""

    pass_: Pass
    rest: str
    """Text of this pass and of all later ones."""
    before: ir.Model
    """The model before the pass, for comparison and rollback; it shares tensors with ``model``."""
    model: ir.Model
    result: PassResult = field(init=False)
    comparison: Comparison | None = None
    measured: dict[str, float] = field(default_factory=dict)
    failure: CheckFailed | None = None
    vetted: bool = False
    """True if the model is known to meet its budget, from more cases than `CompareEach` has."""
    innocent: bool = False
    """True if the original failed (in the background), not the pass."""

    def __post_init__(self) -> None:
        """The empty result, until the pass has run."""
        self.result = PassResult(self.model, modified=False)


class Instrument:
    """Base class of observers; each hook does nothing by default. `after` may raise CheckFailed."""

    def before(self, step: Step) -> None:
        """Hook before the pass."""

    def after(self, step: Step) -> None:
        """Hook after the pass; `step.result` is its result."""

    def failed(self, step: Step, error: Exception) -> None:
        """Hook for an exception of the pass or of a later instrument."""


class VerifyEach(Instrument):
    """Verify the structure after each pass, and that a pass that reports "unchanged" did not change the graph."""

    def __init__(self) -> None:
        self._before: ir.Model | None = None
        self._print: Fingerprint = ()

    def before(self, step: Step) -> None:
        """Store a fingerprint of the graph."""
        # A pipeline copies the model again only after a pass that changed it: the same copy means the same graph.
        if step.before is not self._before:
            self._before, self._print = step.before, fingerprint(step.model)

    def after(self, step: Step) -> None:
        """Raise CheckFailed if the graph is invalid, or changed although the pass reported no change."""
        if not step.result.modified:
            if fingerprint(step.model) != self._print:
                raise CheckFailed(f"{step.pass_.name} said it changed nothing, but the graph is different")
            return
        try:
            verify(step.model)
        except CheckFailed as error:
            # A source may have faults that runtimes accept: only new ones count against the pass.
            if _messages(step.model) <= _messages(step.before):
                return
            raise CheckFailed(f"{step.pass_.name}: {error.what}", picture=error.picture) from None


def _messages(model: ir.Model) -> set[str]:
    """The faults of a graph, except for valid operators that the standard's shape inference rejects."""
    return {fault.message for fault in faults_of(model)}


class CompareEach(Instrument):
    """Run the component before and after each pass that changed it, and compare the change with a budget."""

    def __init__(
        self,
        signature: Signature,
        inputs: Sequence[Arrays],
        budget_of: Callable[[Pass], Budget],
        load: Callable[[ir.Model], Engine],
        outputs: Sequence[Arrays] | None = None,
    ) -> None:
        """``outputs`` are those of the model before the first pass, if they are known."""
        self.signature = signature
        self.inputs = inputs
        self.budget_of = budget_of
        self.load = load
        self._outputs = outputs
        self._engine: Engine | None = None

    def after(self, step: Step) -> None:
        """Raise CheckFailed if the pass changed an output by more than its budget."""
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
        # A vetted pass has met the budget on more cases than this instrument has.
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
    """Measure seconds of each pass, and the growth of this process's peak memory."""

    def before(self, step: Step) -> None:
        """Start the clock."""
        self._memory = peak_memory()
        self._start = time.perf_counter()

    def after(self, step: Step) -> None:
        """Stop the clock."""
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
        """Print the graph, if requested before this pass."""
        if self.when == "before":
            self._print(step, "before")

    def after(self, step: Step) -> None:
        """Print the graph, if requested after this pass."""
        if self.when == "after" or (self.when == "after-change" and step.result.modified):
            self._print(step, "after")

    def _print(self, step: Step, moment: str) -> None:
        if self.only in (None, step.pass_.name):
            print(f"// {moment} {step.pass_}\n{text_of(step.model)}", file=self.file or sys.stderr)


class Reproducer(Instrument):
    """On a failure, write a reproducer: the model before the pass, and one command.

    ``save`` writes a model to a file; it is a parameter because only backends and the driver write models.
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
        """True to ignore a pass that is not exact and only exceeded its accuracy budget."""
        self.commands: list[str] = []

    def failed(self, step: Step, error: Exception) -> None:
        """Write `before.onnx`, the remaining pipeline and the command; add the command to the error."""
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
    """The graph as ONNX text, without weights."""
    return ir.to_onnx_text(without_weights(model, limit=16))


Fingerprint = tuple[object, ...]
"""Facts of a model that compare equal if it is unchanged."""

_FEW = 16
"""Entries of constants that are compared by value: shapes and axes."""


def fingerprint(model: ir.Model) -> Fingerprint:
    """The structure, the attributes and the identity of the tensors of a model: equal if no pass changed anything.

    It is made after every pass, hence neither copied nor printed: that takes four times as long.
    """
    numbers: dict[ir.Value | None, int] = {}
    functions = [
        (str(key), sorted(function.opset_imports.items()), _attributes(function, numbers), _facts(function, numbers))
        for key, function in model.functions.items()
    ]
    about = model.ir_version, sorted(model.opset_imports.items()), sorted(model.metadata_props.items())
    return *about, _facts(model.graph, numbers), functions


def _facts(graph: ir.Graph | ir.Function, numbers: dict[ir.Value | None, int]) -> Fingerprint:
    """Facts of a graph; a value is its number in the order of appearance, and its name."""

    def told(values: Iterable[ir.Value | None]) -> list[object]:
        return [
            None
            if value is None
            else (numbers.setdefault(value, len(numbers)), value.name, str(value.type), _sizes(value.shape))
            for value in values
        ]

    initializers = list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
    weights = [
        None if v.const_value is None else (id(v.const_value), _tensor_facts(v.const_value)) for v in initializers
    ]
    nodes = [
        (node.op_identifier(), node.name, told(node.inputs), told(node.outputs), _attributes(node, numbers))
        for node in graph
    ]
    return graph.name, told(graph.inputs), told(initializers), weights, nodes, told(graph.outputs)


def _attributes(node: ir.Node | ir.Function, numbers: dict[ir.Value | None, int]) -> list[object]:
    def value_of(attribute: ir.Attr) -> object:
        if attribute.is_ref():
            return attribute.ref_attr_name
        if attribute.type is ir.AttributeType.TENSOR:
            return _tensor_facts(attribute.as_tensor())
        if attribute.type is ir.AttributeType.TENSORS:
            return [_tensor_facts(tensor) for tensor in attribute.as_tensors()]
        if attribute.type is ir.AttributeType.GRAPH:
            return _facts(attribute.as_graph(), numbers)
        if attribute.type is ir.AttributeType.GRAPHS:
            return [_facts(graph, numbers) for graph in attribute.as_graphs()]
        return str(attribute.value)

    return [(name, attribute.type, value_of(attribute)) for name, attribute in node.attributes.items()]


def _sizes(shape: ir.Shape | None) -> tuple[int | ir.SymbolicDim, ...] | None:
    """A copy: shapes are changed in place."""
    return None if shape is None else tuple(shape)


def _tensor_facts(tensor: ir.TensorProtocol) -> Fingerprint:
    """Element type, sizes, and the content of small tensors: large ones may lie in a file, and are told by identity."""
    if tensor.size > _FEW:
        content: object = id(tensor)
    else:
        content = tensor.numpy().tolist() if tensor.dtype is ir.DataType.STRING else tensor.tobytes()
    return tensor.dtype, sizes_of(tensor), content
