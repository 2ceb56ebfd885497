"""Sensitivity of MatMuls to quantization, and the largest set of them that meets an accuracy budget.

The loss of a MatMul is the change of the model's outputs if it alone is quantized. One float run gives the activations
of all MatMuls. The quantization error of each follows from its activation, and is added to its output in the float
model: no model is built for a candidate. Losses are nearly additive. If tracing errors to the outputs takes too long,
the relative error of the MatMul's own output is used. Activations in subgraphs cannot be graph outputs: their MatMuls
are measured on random activations, and no error is traced if there is one.

If quantizing all MatMuls meets the budget, errors are not traced. Otherwise MatMuls are ordered by loss per saved
multiplication. The number to exclude is found by running the quantized model and comparing it with the original's
outputs. (Dong et al. 2019, "HAWQ", order layers similarly, by curvature.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.metrics import compare, divergence, visible_part
from planish.optimizer.fidelity.reference import Reference
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.interfaces.quantization_pass import MatMulSite, QuantizationPass
from planish.optimizer.ir.edit import replace_value
from planish.optimizer.ir.graph import location_of, rank_of, sizes_of, weight_bytes
from planish.optimizer.ir.program import Arrays, Role, Signature, TensorSpec
from planish.optimizer.pipeline.instruments import Instrument, Step
from planish.optimizer.pipeline.pipeline import Outcome, Pipeline
from planish.optimizer.runtime.cases import size_of_case, thin

_CASES = 3
"""Number of cases, the smallest ones, on which losses are measured."""
_ROWS = 64
"""Number of random rows for a MatMul whose activation is not observable."""
_WORK = 1e11
"""Maximum bytes of weights read to trace all losses; above it, losses are estimated."""


@dataclass(frozen=True)
class Loss:
    """Cost and benefit of quantizing one MatMul."""

    product: str
    location: str
    relative_mse: float
    """Squared error of the MatMul's output, relative to the squared output."""
    output_error: float | None
    """Change of the model's outputs; None if it was not traced."""
    weights: int
    """Elements of the matrix, equal to the multiplications per token."""

    @property
    def price(self) -> float:
        """Loss per saved multiplication."""
        return (self.relative_mse if self.output_error is None else self.output_error) / self.weights


@dataclass(frozen=True)
class Decision:
    """A MatMul that the pass ``text`` can quantize, its loss, and whether it is quantized."""

    text: str
    """The pass without its option `skip`."""
    loss: Loss
    rounded: bool


def losses(
    step: QuantizationPass,
    model: ir.Model,
    inputs: Sequence[Arrays],
    load: Callable[[ir.Model], Engine],
    signature: Signature,
    *,
    traced: bool = True,
) -> list[Loss]:
    """The loss of every MatMul that ``step`` can quantize in ``model``, in decreasing order.

    Errors are ``traced`` to the outputs unless the model is too large.
    """
    sites = [site for site in step.candidates(model) if step.not_ready(site) is None]
    if not sites:
        return []
    cases = sorted(inputs, key=size_of_case)[:_CASES]
    shown = [site for site in sites if site.node.graph is site.main and site.observable]
    probe = _Probe(model, shown, load, signature)
    seen = [probe.run(case) for case in cases]
    # One run per MatMul and case reads all weights: above 10^11 bytes that takes minutes.
    traced = traced and len(shown) == len(sites) and len(sites) * weight_bytes(model) <= _WORK
    measured = []
    for site in sites:
        data = [values[site.data.name or ""] for values in seen] if site in shown else [_drawn(site)]
        errors, power = _errors(step, site, data)
        relative_mse = (
            sum(float(np.square(error, dtype=np.float64).sum()) for error in errors) / power if power else 0.0
        )
        per_case = zip(cases, seen, errors, strict=True) if traced else ()
        effects = [probe.output_error(site, case, exact, error) for case, exact, error in per_case]
        output_error = _short(sum(effects) / len(effects)) if effects else None
        measured.append(
            Loss(
                site.name, location_of(site.node), _short(relative_mse), output_error, math.prod(sizes_of(site.tensor))
            )
        )
    return sorted(measured, key=lambda loss: (-loss.price, loss.product))


def _drawn(site: MatMulSite) -> np.ndarray:
    """Normally distributed rows of the matrix's height, equal for equal heights."""
    return np.random.default_rng(0).standard_normal((_ROWS, sizes_of(site.tensor)[0])).astype(np.float32)


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _errors(step: QuantizationPass, site: MatMulSite, data: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """The change of a MatMul's output for each input, and the sum of squares of the exact outputs."""
    matrix, quantized = site.tensor.numpy(), step.dequantized_weight(site)
    exact = [rows @ matrix for rows in data]
    errors = [step.dequantized_input(site, rows) @ quantized - right for rows, right in zip(data, exact, strict=True)]
    return errors, sum(float(np.square(right, dtype=np.float64).sum()) for right in exact)


class _Probe:
    """A float model with the activations of its MatMuls as outputs, and an input for the error of each."""

    def __init__(
        self, model: ir.Model, sites: Sequence[MatMulSite], load: Callable[[ir.Model], Engine], signature: Signature
    ) -> None:
        self._signature = signature
        copy = model.clone()
        nodes = {node.outputs[0].name: node for node in copy.graph}
        self._quiet = {site.name: _take_error(copy.graph, nodes[site.node.outputs[0].name]) for site in sites}
        shown = {value.name for value in copy.graph.outputs}
        values = {value.name: value for node in copy.graph for value in node.outputs}
        self._wanted = {site.data.name or "" for site in sites}
        copy.graph.outputs.extend(values[name] for name in sorted(self._wanted - shown) if name in values)
        self._engine = load(copy)

    def run(self, case: Arrays, errors: Arrays | None = None) -> dict[str, np.ndarray]:
        """Outputs and MatMul activations, with errors (by MatMul name) added to MatMul outputs."""
        all_errors = {**self._quiet, **(errors or {})}
        outputs = self._engine.run({**case, **{f"{name}{_ERROR}": array for name, array in all_errors.items()}})
        return outputs | {name: np.asarray(case[name], np.float32) for name in self._wanted if name in case}

    def output_error(self, site: MatMulSite, case: Arrays, exact: Arrays, error: np.ndarray) -> float:
        """Change of the outputs for an error of one MatMul: relative squared error, or mean Kullback-Leibler divergence
        for scores, summed over all outputs except the cache."""
        outputs = self.run(case, {site.name: error})
        return sum(
            _distance(self._signature, tensor, case, exact[tensor.name], outputs[tensor.name])
            for tensor in self._signature.outputs
            if tensor.role is not Role.CACHE
        )


_ERROR = "_error"


def _take_error(graph: ir.Graph, node: ir.Node) -> np.ndarray:
    """Add a graph input to the output of a MatMul; returns the input's neutral value, zero."""
    old = node.outputs[0]
    rank = rank_of(old)
    error = ir.Value(name=f"{node.name or old.name}{_ERROR}", type=ir.TensorType(ir.DataType.FLOAT))
    error.shape = None if rank is None else ir.Shape([f"{error.name}_{axis}" for axis in range(rank)])
    graph.inputs.append(error)
    add = ir.node("Add", [old, error], name=f"{old.name}_with_error")
    # replace_value redirects all readers, the new Add as well; its operand is restored below.
    replace_value(old, add.outputs[0], "right")
    add.replace_input_with(0, old)
    graph.insert_after(node, add)
    return np.zeros([1] * (rank or 1), np.float32)


def _distance(signature: Signature, tensor: TensorSpec, case: Arrays, exact: np.ndarray, actual: np.ndarray) -> float:
    mask = visible_part(signature, tensor, case, exact)
    visible = np.broadcast_to(True if mask is None else mask, exact.shape)
    if tensor.role is Role.LOGITS and exact.ndim > 1 and exact.shape[-1] > 1:
        kept = visible.all(axis=-1)
        return divergence(exact[kept], actual[kept]) if kept.any() else 0.0
    wanted, got = exact[visible].astype(np.float64), actual[visible].astype(np.float64)
    power = float(np.square(wanted).sum())
    return float(np.square(got - wanted).sum()) / power if power else 0.0


@dataclass
class SelectMatMuls(Instrument):
    """Exclude from each quantization pass the smallest set of MatMuls that meets the budget, by decreasing loss.

    A pass with an explicit `skip` is not changed.
    """

    signature: Signature
    reference: Callable[[], Reference]
    """Function, so that the original may still run until the first quantization pass."""
    budget: Budget
    load: Callable[[ir.Model], Engine]
    found: dict[str, list[Loss]] = field(default_factory=dict)
    """The measured losses, by the text of the pass without `skip`."""

    def before(self, step: Step) -> None:
        """Find the smallest set of MatMuls to exclude, and set it as the pass's `skip`."""
        pass_ = step.pass_
        # An explicit skip is the choice of a user or of a lock, and must be reproduced.
        if not isinstance(pass_, QuantizationPass) or pass_.skip:
            return
        rounding, last = _behind(step.rest)
        if not pass_.candidates(step.model):
            return
        harmless = self._holds(pass_, step.model, [], 0, [*rounding, *last])
        order = losses(pass_, step.model, self.reference().inputs, self.load, self.signature, traced=not harmless)
        self.found[str(pass_)] = order
        count = 0 if harmless else self._fewest(pass_, step.model, order, rounding, last)
        # The selection was compared with the original on all reference cases: CompareEach need not decide again.
        step.vetted = bool(order)
        if count:
            text = str(pass_)
            step.pass_ = replace(pass_, skip=tuple(sorted(loss.product for loss in order[:count])))
            step.rest = str(step.pass_) + step.rest.removeprefix(text)

    def _fewest(
        self,
        pass_: QuantizationPass,
        model: ir.Model,
        order: Sequence[Loss],
        rounding: Sequence[QuantizationPass],
        last: Sequence[Pass],
    ) -> int:
        """The smallest number of MatMuls to exclude, by bisection: the error is assumed to decrease with it.

        Excluded MatMuls are quantized by later passes if the budget permits.
        """
        everything = len(order)
        if not everything:
            return 0
        # If even excluding all here fails, later passes exceed the budget by themselves: leave nothing to them.
        rounding = rounding if self._holds(pass_, model, order, everything, [*rounding, *last]) else []
        if not rounding and self._holds(pass_, model, order, 0, last):
            return 0
        bad, good = 0, everything
        while good - bad > 1:
            middle = (bad + good) // 2
            holds = self._holds(pass_, model, order, middle, [*rounding, *last])
            bad, good = (bad, middle) if holds else (middle, good)
        return good

    def _holds(
        self, pass_: QuantizationPass, model: ir.Model, order: Sequence[Loss], count: int, later: Sequence[Pass]
    ) -> bool:
        """True if the model meets the budget when the ``count`` MatMuls of largest loss are left to ``later``
        passes."""
        trial = model.clone()
        for pass_to_run in (replace(pass_, skip=tuple(loss.product for loss in order[:count])), *later):
            pass_to_run(trial)
        engine, reference = self.load(trial), self.reference()
        outputs = (thin(case, engine.run(case)) for case in reference.inputs)
        return not self.budget.violations(compare(self.signature, reference.inputs, reference.outputs, outputs))


def decisions(losses: Mapping[str, Sequence[Loss]], outcome: Outcome | None) -> list[Decision]:
    """A decision for each measured MatMul; without an outcome, which applied the passes, none is quantized."""
    applied = [] if outcome is None else outcome.applied.passes
    skipped = {str(replace(step, skip=())): set(step.skip) for step in applied if isinstance(step, QuantizationPass)}
    return [
        Decision(text, loss, rounded=loss.product not in skipped.get(text, {loss.product}))
        for text, measured in losses.items()
        for loss in measured
    ]


def _behind(rest: str) -> tuple[list[QuantizationPass], list[Pass]]:
    """The later quantization passes of a pipeline, and its other later passes that are not exact."""
    later = [pass_ for pass_ in Pipeline.parse(rest).passes[1:] if not pass_.exact]
    rounding = [pass_ for pass_ in later if isinstance(pass_, QuantizationPass)]
    return rounding, [pass_ for pass_ in later if not isinstance(pass_, QuantizationPass)]


def tightened(budget: Budget, share: float) -> Budget:
    """The budget with only a share of its tolerance, which is the distance between bound and ideal value."""
    return Budget(
        tuple(replace(clause, bound=clause.ideal + (clause.bound - clause.ideal) * share) for clause in budget.clauses)
    )
