"""Search for the first pass, and its first site, that exceeds the accuracy budget: `planish bisect`.

Passes run one after the other, each compared with the reference of the initial model. The first pass that exceeds the
budget is repeated on fewer sites, until its first failing site is found. The subgraph of that site is extracted as a
model of a few nodes that reproduces the failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.compilation.references import file_reference
from planish.optimizer.driver.opt import files_of
from planish.optimizer.errors import BadInput, CheckFailed, PlanishError, UsageError
from planish.optimizer.fidelity.budget import Budget, metrics_of
from planish.optimizer.fidelity.inputs import QUICK
from planish.optimizer.fidelity.metrics import compare
from planish.optimizer.fidelity.reference import Reference, References
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.pass_base import Pass, PassResult, at_most
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.program import Arrays, Signature
from planish.optimizer.ir.verifier import verify
from planish.optimizer.lowering import lower
from planish.optimizer.output.manifest import Manifest, engine_folder
from planish.optimizer.pipeline.pipeline import Pipeline
from planish.optimizer.runtime.cases import size_of_case, thin
from planish.optimizer.system.links import refuse_links_out
from planish.optimizer.system.scratch import scratch_folder
from planish.optimizer.system.staging import demand_not_read, staged_file

_ALL = 1 << 40
_RINGS = 3
"""Maximum neighbourhood of a site in the extracted subgraph, in steps along edges."""


@dataclass(frozen=True)
class Culprit:
    """The first pass that exceeds the budget, and its first failing site (None if the pass has no single sites)."""

    text: str
    """The pass with its options."""
    site: str | None
    violations: tuple[str, ...]
    runs: int
    """Number of runs of the pass."""
    nodes: int
    """Nodes of the written model, on which the pass alone fails."""
    command: str
    """The command that reproduces the failure."""


@dataclass(frozen=True)
class Attempt:
    """One run of a pass: its result (None if it raised), the violations, and the number of rewritten sites."""

    result: PassResult | None
    violations: Sequence[str]
    sites: int


@dataclass(frozen=True)
class Oracle:
    """Signature and reference of a model, with which rewritten models are compared."""

    signature: Signature
    reference: Reference
    exact: Budget
    """The budget of exact passes."""
    asked: Budget

    @classmethod
    def of(cls, source: Path, asked: Budget, fixed: Mapping[str, int]) -> tuple[ir.Model, Oracle]:
        """The model in an ONNX file, with static sizes ``fixed``, and its oracle. CheckFailed if the model itself
        fails."""
        model, trial = _of_output(source, asked) if source.is_dir() else _of_file(source, asked, fixed)
        bad = trial.violations(model, [])
        if bad:
            raise CheckFailed(f"it does not match its own reference before any pass: {bad[0]}", where=source)
        return model, trial

    def violations(self, model: ir.Model, applied: Sequence[Pass]) -> list[str]:
        """Violations of a model after these passes: an invalid graph, a failed run, or a missed budget."""
        exact = all(step.exact for step in applied)
        budget = self.exact if exact else self.asked
        try:
            verify(model)
            engine = registry.interpreter().load(model)
            outputs = [thin(case, engine.run(case)) for case in self.reference.inputs]
            comparison = compare(self.signature, self.reference.inputs, self.reference.outputs, outputs)
        except (CheckFailed, ValueError) as error:  # what does not run, or gives outputs of other shapes
            return [str(error)]
        return budget.violations(comparison)

    def attempt(self, model: ir.Model, applied: Sequence[Pass], sites: int = _ALL) -> Attempt:
        """Run the last of the passes on at most ``sites`` of its sites, on a model to which the others were applied."""
        with at_most(sites) as left:
            try:
                load = registry.interpreter().load
                Calibrate(self.signature, lambda: self.reference.inputs, load).gather(applied[-1], model)
                result = applied[-1](model)
            except Exception as error:  # noqa: BLE001 - a pass that breaks is what is looked for
                return Attempt(None, [f"{type(error).__name__}: {error}"], sites - max(left[0], 0))
        outcome = result if isinstance(result, PassResult) else PassResult(result.model, result.modified)
        return Attempt(outcome, self.violations(model, applied) if outcome.modified else [], sites - max(left[0], 0))


def _of_file(source: Path, asked: Budget, fixed: Mapping[str, int]) -> tuple[ir.Model, Oracle]:
    """The model in a file, compared with its own outputs."""
    lowered = lower(source).with_fixed(fixed)
    model, signature = lowered.program.sole()
    asked.refuse_unmeasured(metrics_of(signature))
    reference = file_reference(lowered)
    return model, Oracle(signature, reference, reference.exact_budget(), asked)


def _of_output(folder: Path, asked: Budget) -> tuple[ir.Model, Oracle]:
    """The first ONNX engine of an output, compared with the stored reference of the original."""
    refuse_links_out(folder)
    manifest = Manifest.read(folder)
    files = {
        name: [engine_folder(folder, name) / registry.backend_class(name).file_of(part) for part in manifest.signatures]
        for name in manifest.targets
    }
    name = next((name for name, paths in files.items() if all(file.suffix == ".onnx" for file in paths)), None)
    if name is None or len(files[name]) > 1 or not manifest.reference.noise:
        why = "no engine of ONNX files" if name is None else "several components" if len(files[name]) > 1 else ""
        raise BadInput(f"this output has {why or 'no reference'}", where=folder, advice="give the .onnx file of one")
    references = References.load(folder / "reference", manifest.reference.noise, manifest.reference.origin)
    ((component, reference),) = references.components.items()
    pairs = sorted(zip(reference.inputs, reference.outputs, strict=True), key=lambda pair: size_of_case(pair[0]))
    inputs, outputs = zip(*pairs[:QUICK], strict=True)
    budget = manifest.targets[name].budget(component)
    signature = manifest.signatures[component].signature()
    asked.refuse_unmeasured(metrics_of(signature))
    budget = budget if budget.clauses else reference.exact_budget()  # what was asked for is about whole engines
    model, _ = lower(files[name][0]).program.sole()
    return model, Oracle(
        signature, replace(reference, inputs=inputs, outputs=outputs), budget, asked if asked.clauses else budget
    )


def bisect(source: Path, pipeline: str, repro: Path, *, keep: Sequence[str] = ()) -> Culprit | None:
    """The first pass and site of ``pipeline`` that exceeds the budget on the ONNX file ``source``; None if none does.

    For an output, the pipeline starts from its first ONNX engine, with the original's reference and the engine's
    budget. ``keep`` is the budget of passes that are not exact, and required for them on a file. A small model on which
    the pass alone fails is written to ``repro``.
    """
    steps, asked = Pipeline.parse(pipeline), Budget.parse(keep)
    demand_not_read({"SOURCE": source}, files_of(repro))
    if source.is_dir() and repro.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"this lies inside {source}, which is only read", where=f"-o {repro}", advice="name another")
    bent = next((step for step in steps.passes if not step.exact), None)
    if keep and bent is None:
        raise UsageError(
            "all passes are exact, and held against rounding alone", where=f"--keep {asked}", advice="leave it out"
        )
    if not keep and bent is not None and not source.is_dir():
        raise UsageError(
            f"{bent.name} is not exact, and nothing says how far it may go",
            where=source,
            advice="give --keep METRIC>=X",
        )
    model, trial = Oracle.of(source, asked, steps.fixed)
    # The reproducer must not replace external data that the model still reads.
    demand_not_read(_weights_of(model), files_of(repro))
    for count in range(1, len(steps.passes) + 1):
        before = model.clone()
        attempt = trial.attempt(model, steps.passes[:count])
        if attempt.violations:
            return _blame(_Search(trial, steps.passes[:count], before), attempt, repro, keep)
    return None


def _weights_of(model: ir.Model) -> dict[str, Path]:
    """The external data files of a model, by their descriptions for messages."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    paths = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return {f"weights of SOURCE, {path.name},": path for path in sorted(paths)}


@dataclass(frozen=True)
class _Search:
    """A failing pass, the passes before it, and the model that it fails on."""

    trial: Oracle
    applied: Sequence[Pass]
    before: ir.Model

    def first_site(self, attempt: Attempt) -> tuple[int, Attempt, int]:
        """The number of the first failing site, the run that ends there, and the number of runs."""
        good, bad, runs = 0, attempt.sites, 1
        # Bisection assumes that more sites do not repair an error; the found site fails in any case.
        while bad - good > 1:
            middle = (good + bad) // 2
            tried = self.trial.attempt(self.before.clone(), self.applied, middle)
            runs += 1
            if tried.violations:
                bad, attempt = middle, tried
            else:
                good = middle
        return bad, attempt, runs

    def until(self, sites: int) -> ir.Model:
        """The model with the first ``sites`` sites rewritten."""
        model = self.before.clone()
        self.trial.attempt(model, self.applied, sites)
        return model


def _blame(search: _Search, attempt: Attempt, repro: Path, keep: Sequence[str]) -> Culprit:
    """Find the failing site, and write a reproducer."""
    step = search.applied[-1]
    number, last, runs = search.first_site(attempt)
    good = search.until(number - 1) if number else search.before
    site = None if number == 0 else last.result.sites[-1] if last.result and last.result.sites else f"number {number}"
    # A pass that raises has no rewritten site to cut around.
    piece = _smallest(search, good) if number and last.result else good
    with staged_file(repro) as path:
        onnx_io.save(piece, path)
    options = "".join(f" --keep '{text}'" for text in keep)
    command = f"planish opt {repro} --pipeline '{step}' -o {repro.with_suffix('.after.onnx')}{options}"
    return Culprit(str(step), site, tuple(last.violations), runs, len(piece.graph), command)


def _smallest(search: _Search, good: ir.Model) -> ir.Model:
    """The smallest subgraph around the next site on which the pass alone fails, or the whole graph."""
    bad = good.clone()
    search.trial.attempt(bad, search.applied, 1)
    with scratch_folder() as scratch:
        for number, piece in enumerate(_cuts(search.trial, good, bad)):
            path = scratch / f"{number}.onnx"
            onnx_io.save(piece, path)
            if _fails(path, search.applied[-1], search.trial.asked):
                return piece
    return good


def _fails(path: Path, step: Pass, asked: Budget) -> bool:
    """True if the pass fails on the model in a file, as in `planish opt`."""
    try:
        model, trial = Oracle.of(path, asked, step.fixed)
    except PlanishError:
        return False  # the cut does not run by itself: a wider one is tried
    return bool(trial.attempt(model, [step]).violations)


def _cuts(trial: Oracle, good: ir.Model, bad: ir.Model) -> Iterator[ir.Model]:
    """The nodes in which two graphs differ, extracted from the first one; then with growing neighbourhoods."""
    kept = {_key(node) for node in bad.graph}
    region = {id(node): node for node in good.graph if _key(node) not in kept}
    for _ in range(_RINGS if region else 0):
        piece = _cut(trial, good, list(region.values()))
        if piece is not None:
            yield piece
        # A cut may lack the context that the pass's pattern requires: widen it.
        region |= {id(near): near for node in region.values() for near in _neighbours(node, good.graph)}


def _key(node: ir.Node) -> tuple[object, ...]:
    """A key that is equal for nodes of two graphs with the same operator, attributes and names of values."""
    # Names of nodes are left out: both graphs may have renamed them.
    attributes = sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())
    names = [None if value is None else value.name for value in node.inputs]
    return (node.domain, node.op_type, *names, *(value.name for value in node.outputs), str(attributes))


def _neighbours(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    producers = (value.producer() for value in node.inputs if value is not None)
    readers = (use.node for value in node.outputs for use in value.uses())
    return (near for near in (*producers, *readers) if near is not None and near.graph is graph)


def _cut(trial: Oracle, model: ir.Model, region: Sequence[ir.Node]) -> ir.Model | None:
    """The nodes as a model of static shapes, from a run of the whole model; None if a value cannot be read."""
    inside = {id(node) for node in region}
    read = {id(v): v for node in region for v in node.inputs if v is not None and id(v.producer()) not in inside}
    inputs = [value for value in read.values() if value.const_value is None]
    computed = [value for node in region for value in node.outputs]
    outputs = [v for v in computed if v.is_graph_output() or any(id(use.node) not in inside for use in v.uses())]
    arrays = _seen(trial, model, [*inputs, *outputs])
    if arrays is None:
        return None
    try:
        graph = ir.convenience.extract(model.graph, inputs, outputs)
    except ValueError:
        return None  # a node outside lies between two inside: a wider cut holds it
    for value in (*graph.inputs, *graph.outputs):
        array = arrays[value.name or ""]
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Model(graph, ir_version=model.ir_version, producer_name="planish")


def _seen(trial: Oracle, model: ir.Model, values: Sequence[ir.Value]) -> Arrays | None:
    """These values of the main graph on the first reference input; None if a type is unknown."""
    case = trial.reference.inputs[0]
    shown = model.clone()
    by_name = ir.convenience.create_value_mapping(shown.graph, include_subgraphs=False)
    copies = [by_name[value.name or ""] for value in values]
    # Outputs without a type are no valid outputs of a graph.
    hidden = [value for value in copies if not value.is_graph_output() and not value.is_graph_input()]
    if any(value.dtype is None for value in hidden):
        return None
    shown.graph.outputs.extend(hidden)
    arrays: dict[str, np.ndarray] = {**case, **registry.interpreter().load(shown).run(case)}
    return arrays if all((value.name or "") in arrays for value in values) else None
