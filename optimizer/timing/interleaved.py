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
"""Timed calls of a turn; the first of them warms the caches again and is not counted."""
_TURN_SECONDS = 0.4
"""A turn is cut short after this long."""
_FEWEST_ROUNDS = 20
_MOST_ROUNDS = 60
_SEED = 0


@dataclass(frozen=True)
class Timing:
    """Latency of one engine in milliseconds, and its speed as a ratio to the first engine of the same run."""

    median_ms: float
    speedup: float
    low: float
    """Lower end of the confidence interval of the speed-up."""
    high: float
    rounds: int

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies above one."""
        return self.low > 1.0


def time_against_first(
    engines: Sequence[EngineRef], inputs: Sequence[Arrays], *, seconds: float = 30.0
) -> list[Timing]:
    """Time engines in alternation, each on its own inputs; the first is what the others are compared with.

    Ends when every interval excludes one, after the greatest number of rounds, or when ``seconds`` are used up and
    five rounds are done.
    """
    turns = time_interleaved(engines, inputs, seconds=seconds, enough=_clear)
    return [timing(turns[0], own) for own in turns]


def time_interleaved(
    engines: Sequence[EngineRef],
    inputs: Sequence[Arrays],
    *,
    seconds: float = 30.0,
    enough: Callable[[Sequence[Sequence[float]]], bool] = lambda _: False,
) -> list[list[float]]:
    """Milliseconds of each turn of each engine; turn i of one belongs to turn i of every other.

    Every round gives each engine a turn of a few calls, in an order that changes, and a turn counts with the median of
    its calls: ratios within a round are free of the drift of the machine.
    """
    turns: list[list[float]] = [[] for _ in engines]
    with opened(engines) as workers:
        for worker, feeds in zip(workers, inputs, strict=True):
            worker.run(feeds)
            worker.time(_CALLS, _TURN_SECONDS)
            worker.pause()
        start = time.perf_counter()
        for number in range(_MOST_ROUNDS):
            for index in _order(len(workers), number):
                turns[index].append(_turn(workers[index]))
            late = number >= 4 and time.perf_counter() - start > seconds
            if late or (number % _FEWEST_ROUNDS == _FEWEST_ROUNDS - 1 and enough(turns)):
                break
    return turns


def _clear(turns: Sequence[Sequence[float]]) -> bool:
    """Whether every engine is known to be faster or slower than the first."""
    timings = [timing(turns[0], own) for own in turns[1:]]
    return all(found.low > 1 or found.high < 1 for found in timings)


def _order(count: int, number: int) -> list[int]:
    """Engine numbers, rotated by the round and turned round every other time."""
    order = [(index + number) % count for index in range(count)]
    return order[::-1] if number % 2 else order


def _turn(worker: Worker) -> float:
    worker.resume()
    try:
        return statistics.median(worker.time(_CALLS, _TURN_SECONDS)[1:])
    finally:
        worker.pause()


def timing(base: Sequence[float], own: Sequence[float]) -> Timing:
    """An engine's turns compared with those of another, round by round."""
    ratios = np.asarray(base) / np.asarray(own)
    low, high = interval(ratios)
    return Timing(statistics.median(own), float(np.median(ratios)), low, high, len(own))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap confidence interval of the median (percentile method; Efron and Tibshirani 1993, chapter 13)."""
    from scipy.stats import bootstrap

    if len(values) < 2 or np.ptp(values) == 0:
        return float(values[0]), float(values[-1])
    found = bootstrap(
        (values,), np.median, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return float(found.low), float(found.high)
