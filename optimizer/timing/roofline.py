"""Distance of each operator of an engine from what the machine can do.

No product can be faster than the larger of two times: that of its multiply-adds at the peak of their type, and that of
its weights and activations at the rate at which memory is read. The sum over all products is what perfect kernels would
take, with everything else fused into them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planish.optimizer.interfaces.counters import OperatorTime
from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.worker import EngineRef, operator_times
from planish.optimizer.timing.peaks import Peaks, measure_multiply_adds, measure_reading

_CALLS = 20


@dataclass(frozen=True)
class Row:
    """One operator of an engine, or all of a kind."""

    name: str
    kernel: str
    arithmetic: str
    count: int
    milliseconds: float
    share: float
    """Of the time of all operators."""
    rate: float
    """Multiply-adds per second; 0 where nothing is multiplied."""
    achieved: float
    """The share of the peak that is reached: the least time that it can take, over the time that it takes."""


@dataclass(frozen=True)
class Roofline:
    """Operators of an engine at one shape, and the peaks of the machine."""

    peaks: Peaks
    operators: Sequence[OperatorTime]

    @property
    def milliseconds(self) -> float:
        """The time of all operators, as the runtime counts it."""
        return sum(each.milliseconds for each in self.operators)

    @property
    def roof_milliseconds(self) -> float:
        """The least time that the products among them can take."""
        return sum(map(self._roof, self.operators))

    def _roof(self, operator: OperatorTime) -> float:
        """The least milliseconds of a product; of all else a perfect engine would leave nothing: it would be fused."""
        if not operator.multiply_adds:
            return 0.0
        compute = operator.multiply_adds / self.peaks.multiply_adds.get(operator.arithmetic, float("inf"))
        memory = operator.weight_bytes / self.peaks.weights + operator.activation_bytes / self.peaks.activations
        return max(compute, memory) * 1e3

    def by_operator(self) -> list[Row]:
        """Every operator by itself, the slowest first."""
        return self._rows((each.name, each.kernel, each.arithmetic, [each]) for each in self.operators)

    def by_kind(self) -> list[Row]:
        """Operators of equal kind, kernel and type together, the slowest first."""
        groups: dict[tuple[str, str, str], list[OperatorTime]] = defaultdict(list)
        for each in self.operators:
            groups[each.kind, each.kernel, each.arithmetic].append(each)
        return self._rows((*key, same) for key, same in groups.items())

    def _rows(self, groups: Iterable[tuple[str, str, str, Sequence[OperatorTime]]]) -> list[Row]:
        rows = []
        for name, kernel, arithmetic, same in groups:
            milliseconds, roof = sum(each.milliseconds for each in same), sum(map(self._roof, same))
            rate = sum(each.multiply_adds for each in same) / milliseconds * 1e3 if milliseconds else 0.0
            share, achieved = milliseconds / (self.milliseconds or 1.0), roof / milliseconds if milliseconds else 0.0
            rows.append(Row(name, kernel, arithmetic, len(same), milliseconds, share, rate, achieved))
        return sorted(rows, key=lambda row: -row.milliseconds)

    def described(self) -> dict[str, Any]:
        """Everything, as JSON keeps it."""
        return {
            "peaks": asdict(self.peaks),
            "milliseconds": self.milliseconds,
            "roof_milliseconds": self.roof_milliseconds,
            "by_kind": [asdict(row) for row in self.by_kind()],
            "by_operator": [asdict(row) for row in self.by_operator()],
        }


@functools.cache
def _multiply_adds() -> Mapping[str, float]:
    """Measured once in a process: it takes seconds."""
    return measure_multiply_adds()


def roofline(engine: EngineRef, inputs: Arrays) -> Roofline:
    """Measure an engine on ``inputs``, and this machine. BadInput where the runtime has no counters."""
    operators = operator_times(engine, inputs, _CALLS)
    weights, activations = measure_reading([sum(each.weight_bytes for each in operators), 0])
    return Roofline(Peaks(_multiply_adds(), weights, activations), operators)
