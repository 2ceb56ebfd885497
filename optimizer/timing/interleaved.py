"""Timing of engines in alternation: medians, ratios and their confidence intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.worker import EngineRef, Worker, opened

CONFIDENCE = 0.95
_CALLS = 6
"""Calls of a turn. The first one warms the caches and is not counted."""
_TURN_SECONDS = 0.4
"""Seconds after which a turn ends early."""
_FEWEST_ROUNDS = 20
_MOST_ROUNDS = 60
_SEED = 0


@dataclass(frozen=True)
class Timing:
    """Latency of one engine in milliseconds, and its speed-up over the first engine of the same run."""

    median_ms: float
    speedup: float
    low: float
    """Lower end of the confidence interval of the speed-up."""
    high: float
    rounds: int

    @property
    def faster(self) -> bool:
        """True if the whole interval is above one."""
        return self.low > 1.0


def time_against_first(
    engines: Sequence[EngineRef], inputs: Sequence[Arrays], *, seconds: float = 30.0
) -> list[Timing]:
    """Time engines in alternation, each on its own inputs; the first engine is the baseline.

    Ends when every interval excludes one, after the maximum number of rounds, or when ``seconds`` have passed and five
    rounds are done.
    """
    turns = time_interleaved(engines, inputs, seconds=seconds, enough=_clear)
    return [timing(turns[0], turn) for turn in turns]


def time_interleaved(
    engines: Sequence[EngineRef],
    inputs: Sequence[Arrays],
    *,
    seconds: float = 30.0,
    enough: Callable[[Sequence[Sequence[float]]], bool] = lambda _: False,
) -> list[list[float]]:
    """Milliseconds of each turn of each engine; turn i of one engine corresponds to turn i of every other.

    Each round gives each engine a turn of a few calls, in alternating order. The latency of a turn is the median of its
    calls. Ratios within a round are independent of slow drift of the machine.
    """
    turns: list[list[float]] = [[] for _ in engines]
    with opened(engines) as workers:
        for worker, feeds in zip(workers, inputs, strict=True):
            worker.run(feeds)
            worker.time(_CALLS, _TURN_SECONDS)
            # A stopped process keeps its memory but takes no cores from the engine that is timed.
            worker.pause()
        start = time.perf_counter()
        for number in range(_MOST_ROUNDS):
            for index in _order(len(workers), number):
                turns[index].append(_turn(workers[index]))
            # Five rounds at least: a bootstrap interval over fewer ratios is meaningless.
            late = number >= 4 and time.perf_counter() - start > seconds
            if late or (number % _FEWEST_ROUNDS == _FEWEST_ROUNDS - 1 and enough(turns)):
                break
    return turns


def _clear(turns: Sequence[Sequence[float]]) -> bool:
    """True if the interval of every engine excludes one."""
    timings = [timing(turns[0], turn) for turn in turns[1:]]
    return all(measured.low > 1 or measured.high < 1 for measured in timings)


def _order(count: int, number: int) -> list[int]:
    """Engine indices, rotated by the round and reversed every other time."""
    order = [(index + number) % count for index in range(count)]
    # Otherwise each engine would always run after the same one, with its caches and clock frequency.
    return order[::-1] if number % 2 else order


def _turn(worker: Worker) -> float:
    worker.resume()
    try:
        return statistics.median(worker.time(_CALLS, _TURN_SECONDS)[1:])
    finally:
        worker.pause()


def timing(base: Sequence[float], turns: Sequence[float]) -> Timing:
    """Timing of an engine relative to a baseline, from paired turns."""
    ratios = np.asarray(base) / np.asarray(turns)
    low, high = interval(ratios)
    return Timing(statistics.median(turns), float(np.median(ratios)), low, high, len(turns))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap confidence interval of the median (percentile method; Efron and Tibshirani 1993, chapter 13)."""
    from scipy.stats import bootstrap

    # scipy returns nan for a degenerate sample.
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values[0]), float(values[-1])
    result = bootstrap(
        (values,), np.median, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return float(result.low), float(result.high)
