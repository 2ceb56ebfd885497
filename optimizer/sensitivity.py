"""Which products may be rounded: what each loses by itself, and the largest set that stays within a budget.

The loss of a product is a proxy that one run of the model in float gives for all of them: the error that its rounded
operands make in its own output, relative to that output (the inverse of a signal-to-quantization-noise ratio). Products
are ordered by loss per multiplication saved; how many of them go back to float is then decided by running the model,
with the outputs of the original as the measure (Dong et al. 2019, "HAWQ", orders layers likewise, by curvature).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import onnx_ir as ir

from planish.optimizer.backend import Arrays, Engine
from planish.optimizer.base import Pass
from planish.optimizer.compare import Budget, compare
from planish.optimizer.graph import location_of, sizes_of
from planish.optimizer.instruments import Instrument, Step
from planish.optimizer.lock import Product
from planish.optimizer.observing import activations
from planish.optimizer.program import Signature
from planish.optimizer.quantizing import Quantizing, Site
from planish.optimizer.reference import Reference, quick, thin

_ROWS = 512
"""Rows of an activation that a loss is estimated on, taken evenly."""


@dataclass(frozen=True)
class Loss:
    """What rounding one product costs and saves."""

    product: str
    location: str
    noise: float
    """Squared error of its output, relative to the square of the output."""
    weights: int
    """Elements of its matrix: multiplications saved for each token."""

    @property
    def price(self) -> float:
        """Noise for each multiplication saved."""
        return self.noise / self.weights


def losses(
    step: Quantizing, model: ir.Model, inputs: Sequence[Arrays], load: Callable[[ir.Model], Engine]
) -> list[Loss]:
    """The loss of every product that ``step`` can round in ``model``, the dearest first; one run for each input."""
    sites = [site for site in step.candidates(model) if step.unready(site) is None]
    heard = _activations(model, sites, inputs, load)
    found = [
        Loss(site.name, location_of(site.node), _noise(step, site, heard[site.data.name or ""]), _size(site))
        for site in sites
    ]
    return sorted(found, key=lambda loss: (-loss.price, loss.product))


def _size(site: Site) -> int:
    rows, columns = sizes_of(site.tensor)
    return rows * columns


def _activations(
    model: ir.Model, sites: Sequence[Site], inputs: Sequence[Arrays], load: Callable[[ir.Model], Engine]
) -> dict[str, np.ndarray]:
    """What each product multiplies, as rows, over all inputs."""
    names = sorted({site.data.name or "" for site in sites})
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for rows in activations(model, names, inputs, load):
        for name in names:
            parts[name].append(rows[name])
    return {name: _some(np.concatenate(own)) for name, own in parts.items()}


def _some(rows: np.ndarray) -> np.ndarray:
    return rows[:: -(-len(rows) // _ROWS)]


def _noise(step: Quantizing, site: Site, data: np.ndarray) -> float:
    wanted = data @ site.tensor.numpy()
    error = step.heard(site, data) @ step.rounded(site) - wanted
    power = float(np.square(wanted, dtype=np.float64).sum())
    return float(f"{float(np.square(error, dtype=np.float64).sum()) / power:.3g}") if power else 0.0


@dataclass
class Select(Instrument):
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
        """Try with none skipped first, then look for the fewest."""
        pass_ = step.pass_
        if not isinstance(pass_, Quantizing) or pass_.skip:
            return
        order = losses(pass_, step.model, self.reference().inputs, self.load)
        self.found[str(pass_)] = order
        count = self._fewest(pass_, step.model, order)
        if count:
            text = str(pass_)
            step.pass_ = replace(pass_, skip=tuple(sorted(loss.product for loss in order[:count])))
            step.rest = str(step.pass_) + step.rest.removeprefix(text)

    def _fewest(self, pass_: Quantizing, model: ir.Model, order: Sequence[Loss]) -> int:
        """The least number of products to skip, by bisection: fewer rounded products are taken to be closer."""
        if not order or self._holds(pass_, model, order, 0):
            return 0
        bad, good = 0, len(order)
        while good - bad > 1:
            middle = (bad + good) // 2
            bad, good = (bad, middle) if self._holds(pass_, model, order, middle) else (middle, good)
        return good

    def _holds(self, pass_: Quantizing, model: ir.Model, order: Sequence[Loss], count: int) -> bool:
        """Whether the model stays within the budget with the ``count`` dearest products in float.

        Over all cases, and over the few that single passes are checked with.
        """
        tried = model.clone()
        replace(pass_, skip=tuple(loss.product for loss in order[:count]))(tried)
        engine, reference = self.load(tried), self.reference()
        made = [thin(engine.run(case)) for case in reference.inputs]
        few = [
            index for index, case in enumerate(reference.inputs) if any(case is one for one in quick(reference.inputs))
        ]
        for kept in (range(len(made)), few):
            inputs, wanted, got = ([row[i] for i in kept] for row in (reference.inputs, reference.outputs, made))
            if self.budget.violations(compare(self.signature, inputs, wanted, got)):
                return False
        return True

    def products(self, component: str, applied: Sequence[Pass]) -> list[Product]:
        """What was measured, and what came of it in the passes that were applied."""
        skipped = {str(replace(one, skip=())): set(one.skip) for one in applied if isinstance(one, Quantizing)}
        return [
            Product(
                component=component,
                text=text,
                rounded=loss.product not in skipped.get(text, {loss.product}),
                **asdict(loss),
            )
            for text, found in self.found.items()
            for loss in found
        ]


def tightened(budget: Budget, share: float) -> Budget:
    """The budget with only a share of the error it allows: of what a similarity lacks to one, or of an error."""
    return Budget(
        tuple(
            replace(clause, bound=clause.bound * share if clause.relation == "<=" else 1 - (1 - clause.bound) * share)
            for clause in budget.clauses
        )
    )
