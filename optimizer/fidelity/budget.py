"""Accuracy budgets: conditions on metrics that an engine must meet."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.fidelity.metrics import CONTINUED, ERRORS, JUDGED, METRICS, MULTIPLES, Comparison, relation_of
from planish.optimizer.interfaces.option_text import did_you_mean
from planish.optimizer.ir.program import Program, Role, Signature

_OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Clause:
    """One condition of a budget: ``metric >= bound``, on every output or on one."""

    metric: str
    relation: str
    bound: float

    def __str__(self) -> str:
        """`cosine>=0.999`, `perplexity<=1.02x`."""
        times = "x" if self.metric in MULTIPLES else ""
        return f"{self.metric.removesuffix('_ratio')}{self.relation}{self.bound:.6g}{times}"

    @property
    def ideal(self) -> float:
        """The value of a perfect engine: 0 for errors, 1 for similarities and ratios."""
        return 0.0 if self.metric in ERRORS and self.metric not in MULTIPLES else 1.0

    def holds(self, value: float) -> bool:
        """True if ``value`` meets the bound; NaN never does."""
        return _OPERATORS[self.relation](value, self.bound)


@dataclass(frozen=True)
class Budget:
    """Conditions of a comparison; all must hold."""

    clauses: tuple[Clause, ...] = field(default=())

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Budget:
        """Read `METRIC>=X` and `METRIC<=X`; UsageError with the syntax and the known metrics."""
        return cls(tuple(map(_clause, texts)))

    def __str__(self) -> str:
        """The clauses, joined by blanks."""
        return " ".join(map(str, self.clauses))

    def violations(self, comparison: Comparison) -> list[str]:
        """One text for each violated clause and output, and for each clause whose metric no output has."""
        unmeasured = [
            f"nothing measured {clause.metric}, the budget asks {clause}"
            for clause in self.clauses
            if comparison.worst(clause.metric) is None
        ]
        return unmeasured + [
            f"{metric} of {output} is {metrics[metric]:.6g}, the budget asks {clause}"
            for clause in self.clauses
            for output, metrics in comparison.outputs.items()
            if (metric := clause.metric) in metrics and not clause.holds(metrics[metric])
        ]

    def only(self, metrics: Container[str]) -> Budget:
        """The clauses on these metrics."""
        return Budget(tuple(clause for clause in self.clauses if clause.metric in metrics))

    def refuse_unmeasured(self, measured: Container[str]) -> None:
        """Raise UsageError for a clause on a metric that is not ``measured``; it lists the measured ones.

        No engine can keep such a clause, which is better said before anything is built.
        """
        for clause in self.clauses:
            if clause.metric not in measured:
                reason = _UNMEASURED.get(clause.metric, "nothing is compared")
                raise UsageError(
                    f"this cannot be measured here: {reason}",
                    where=f"--keep {clause}",
                    advice=f"there are: {', '.join(metric for metric in METRICS if metric in measured) or 'none'}",
                )

    def check(self, comparison: Comparison, *, where: str) -> None:
        """Raise CheckFailed with every violation, located at ``where``."""
        violations = self.violations(comparison)
        if violations:
            raise CheckFailed("; ".join(violations), where=where)


_UNMEASURED = {
    "cosine": "no output is a vector",
    "cosine_min": "no output is a vector",
    "top1": "no output is a vector of scores",
    "perplexity": "no output scores the next token at every place",
    "kl": "no tokens are written",
    "greedy": "no tokens are written",
    "score": "nothing prints it, give --evaluate to optimize",
    "score_ratio": "nothing prints it, give --evaluate to optimize",
}
"""Reason why a model has no value of a metric."""


def metrics_of(signature: Signature) -> frozenset[str]:
    """The metrics of a component that `compare` can compute."""
    ids = next((tensor.shape for tensor in signature.inputs if tensor.name == "input_ids"), None)
    metrics = {"max_abs", "max_rel"} if signature.outputs else set()
    for tensor in signature.outputs:
        scores = tensor.role is Role.LOGITS and tensor.shape[-1:] not in ((), (1,))
        metrics |= {"cosine", "cosine_min"} if tensor.shape else set()
        metrics |= {"top1"} if scores else set()
        follows = (
            signature.cached and tensor.shape[:-1] == ids and ids[1:] != (1,) and isinstance(tensor.shape[-1], int)
        )
        metrics |= {"perplexity"} if scores and follows else set()
    return frozenset(metrics)


def measured_metrics(program: Program, *, evaluated: bool = False) -> frozenset[str]:
    """The metrics of a program: of its components, of continuations if it generates, and the user's own."""
    components = frozenset[str]().union(*map(metrics_of, program.signatures.values()))
    continued = CONTINUED if program.generates else ()
    return components.union(continued, JUDGED if evaluated else ())


def _clause(text: str) -> Clause:
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+0-9.eE]+)((?<=[0-9.])x)?\s*", text)
    if match is None:
        raise UsageError(f"cannot read the budget {text!r}", advice="write METRIC>=X or METRIC<=X")
    metric, relation, bound, times = match.groups()
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}", where=text)
    # The direction of a user's metric is unknown: both relations are accepted.
    if metric != "score" and relation != relation_of(metric):
        raise UsageError(f"a budget on {metric} is written {metric}{relation_of(metric)}X", where=text)
    metric = "score_ratio" if metric == "score" and times else metric
    if bool(times) != (metric in MULTIPLES):
        what = (
            "a multiple of the original's: perplexity<=1.02x" if not times else f"a number: {metric}{relation}{bound}"
        )
        raise UsageError(f"a budget on {metric} is {what}", where=text)
    try:
        return Clause(metric, relation, float(bound))
    except ValueError:
        raise UsageError(f"{bound!r} is not a number", where=text) from None
