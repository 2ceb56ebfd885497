"""Which products may be rounded: what each loses by itself, and the largest set that stays within a budget.

The loss of a product is the distance of the model's outputs from what they were if it alone is rounded. One run in
float gives what every product multiplies; its error is computed from that, and put into the model by an addition behind
it: no model is built for a candidate. Losses of products nearly add up to that of all. Where even that takes too long,
the error of the product itself, relative to its size, stands for it. What a product of a subgraph multiplies cannot be
shown: its error is that for activations drawn at random, and if there is such a product, no error is traced.

Where all may be rounded there is nothing to choose, and errors are not traced to the outputs. Else products are ordered
by loss per multiplication saved; how many of them go back to float is then decided by running the rounded model, with
the outputs of the original as the measure. (Dong et al. 2019, "HAWQ", orders layers likewise, by curvature.)
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
"""Of the smallest inputs, how many losses are found on."""
_ROWS = 64
"""Drawn for a product whose activation cannot be shown."""
_WORK = 1e11
"""Bytes of weights that may be read to find the losses of all products; else they are estimated."""


@dataclass(frozen=True)
class Loss:
    """What rounding one product costs and saves."""

    product: str
    location: str
    relative_mse: float
    """Squared error of its output, relative to the square of the output."""
    output_error: float | None
    """Distance of the model's outputs; None if it was too much work."""
    weights: int
    """Elements of its matrix: multiplications saved for each token."""

    @property
    def price(self) -> float:
        """Loss for each multiplication saved."""
        return (self.relative_mse if self.output_error is None else self.output_error) / self.weights


@dataclass(frozen=True)
class Decision:
    """A product that the pass ``text`` may round, its loss, and whether it is rounded."""

    text: str
    """The pass, its products to skip left out."""
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
    """The loss of every product that ``step`` can round in ``model``, the dearest first.

    Errors are ``traced`` to the outputs unless that is too much work.
    """
    sites = [site for site in step.candidates(model) if step.not_ready(site) is None]
    if not sites:
        return []
    cases = sorted(inputs, key=size_of_case)[:_CASES]
    shown = [site for site in sites if site.node.graph is site.main and site.observable]
    probe = _Probe(model, shown, load, signature)
    seen = [probe.run(case) for case in cases]
    traced = traced and len(shown) == len(sites) and len(sites) * weight_bytes(model) <= _WORK
    found = []
    for site in sites:
        data = [one[site.data.name or ""] for one in seen] if site in shown else [_drawn(site)]
        errors, power = _errors(step, site, data)
        relative_mse = (
            sum(float(np.square(error, dtype=np.float64).sum()) for error in errors) / power if power else 0.0
        )
        effects = [probe.output_error(site, *one) for one in zip(cases, seen, errors, strict=True)] if traced else []
        output_error = _short(sum(effects) / len(effects)) if effects else None
        found.append(
            Loss(
                site.name, location_of(site.node), _short(relative_mse), output_error, math.prod(sizes_of(site.tensor))
            )
        )
    return sorted(found, key=lambda loss: (-loss.price, loss.product))


def _drawn(site: MatMulSite) -> np.ndarray:
    """Rows of normally distributed numbers, as wide as a matrix is high; the same for the same height."""
    return np.random.default_rng(0).standard_normal((_ROWS, sizes_of(site.tensor)[0])).astype(np.float32)


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _errors(step: QuantizationPass, site: MatMulSite, data: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """What rounding changes of a product for each input, and the square of all that it would be."""
    matrix, rounded = site.tensor.numpy(), step.dequantized_weight(site)
    wanted = [one @ matrix for one in data]
    errors = [step.dequantized_input(site, one) @ rounded - right for one, right in zip(data, wanted, strict=True)]
    return errors, sum(float(np.square(right, dtype=np.float64).sum()) for right in wanted)


class _Probe:
    """A model in float that shows what its products multiply, and takes an error for each of them."""

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
        """Outputs, and what the products multiply; with an error behind some of them, by the product's name."""
        given = {**self._quiet, **(errors or {})}
        found = self._engine.run({**case, **{f"{name}{_ERROR}": array for name, array in given.items()}})
        return found | {name: np.asarray(case[name], np.float32) for name in self._wanted if name in case}

    def output_error(self, site: MatMulSite, case: Arrays, right: Arrays, error: np.ndarray) -> float:
        """Distance of the outputs if one product has this error: relative squared error, or for scores the mean
        Kullback-Leibler divergence, summed over all outputs but the cache."""
        found = self.run(case, {site.name: error})
        return sum(
            _distance(self._signature, tensor, case, right[tensor.name], found[tensor.name])
            for tensor in self._signature.outputs
            if tensor.role is not Role.CACHE
        )


_ERROR = "_error"


def _take_error(graph: ir.Graph, node: ir.Node) -> np.ndarray:
    """Add an input of the graph to a product; returns what stands for no error."""
    old = node.outputs[0]
    rank = rank_of(old)
    error = ir.Value(name=f"{node.name or old.name}{_ERROR}", type=ir.TensorType(ir.DataType.FLOAT))
    error.shape = None if rank is None else ir.Shape([f"{error.name}_{axis}" for axis in range(rank)])
    graph.inputs.append(error)
    add = ir.node("Add", [old, error], name=f"{old.name}_with_error")
    replace_value(old, add.outputs[0], "right")
    add.replace_input_with(0, old)
    graph.insert_after(node, add)
    return np.zeros([1] * (rank or 1), np.float32)


def _distance(signature: Signature, tensor: TensorSpec, case: Arrays, right: np.ndarray, found: np.ndarray) -> float:
    mask = visible_part(signature, tensor, case, right)
    visible = np.broadcast_to(True if mask is None else mask, right.shape)
    if tensor.role is Role.LOGITS and right.ndim > 1 and right.shape[-1] > 1:
        kept = visible.all(axis=-1)
        return divergence(right[kept], found[kept]) if kept.any() else 0.0
    wanted, got = right[visible].astype(np.float64), found[visible].astype(np.float64)
    power = float(np.square(wanted).sum())
    return float(np.square(got - wanted).sum()) / power if power else 0.0


@dataclass
class SelectMatMuls(Instrument):
    """Let each quantizing pass skip as few products as the budget needs, the dearest first.

    A pass whose products to skip were written out is left as it is.
    """

    signature: Signature
    reference: Callable[[], Reference]
    """Asked when the first such pass is about to run: the original may still be at work."""
    budget: Budget
    load: Callable[[ir.Model], Engine]
    found: dict[str, list[Loss]] = field(default_factory=dict)
    """What was measured, by the text of the pass without the products to skip."""

    def before(self, step: Step) -> None:
        """Find the fewest products to skip, and write them into the pass."""
        pass_ = step.pass_
        if not isinstance(pass_, QuantizationPass) or pass_.skip:
            return
        rounding, last = _behind(step.rest)
        if not pass_.candidates(step.model):
            return
        harmless = self._holds(pass_, step.model, [], 0, [*rounding, *last])
        order = losses(pass_, step.model, self.reference().inputs, self.load, self.signature, traced=not harmless)
        self.found[str(pass_)] = order
        count = 0 if harmless else self._fewest(pass_, step.model, order, rounding, last)
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
        """The least number of products to skip, by bisection: fewer rounded products are taken to be closer.

        What is skipped shall be rounded by those passes behind, if the budget has room for that.
        """
        everything = len(order)
        if not everything:
            return 0
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
        """Whether the model stays within the budget if the ``count`` dearest products are left to ``later`` passes."""
        tried = model.clone()
        for one in (replace(pass_, skip=tuple(loss.product for loss in order[:count])), *later):
            one(tried)
        engine, reference = self.load(tried), self.reference()
        made = (thin(engine.run(case)) for case in reference.inputs)
        return not self.budget.violations(compare(self.signature, reference.inputs, reference.outputs, made))


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
    """The quantizing passes behind the first of a pipeline, and the others that round something: activations, say."""
    later = [one for one in Pipeline.parse(rest).passes[1:] if not one.exact]
    rounding = [one for one in later if isinstance(one, QuantizationPass)]
    return rounding, [one for one in later if not isinstance(one, QuantizationPass)]


def tightened(budget: Budget, share: float) -> Budget:
    """The budget with only a share of the error it allows: of the distance to what the original itself has."""
    return Budget(tuple(replace(one, bound=one.ideal + (one.bound - one.ideal) * share) for one in budget.clauses))
