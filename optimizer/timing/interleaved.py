"""Timing of engines in alternation: medians, ratios and their confidence intervals.

Every engine is opened several times, each time in a new process: where its weights come to lie in memory is luck, which
all turns of one opening share. So the interval is that of the openings, not that of the turns. The first engine runs
twice in each opening. Its second copy, the twin, is as fast as the first, and where the clock finds them apart, all
intervals of the race reach at least as far (decision 51).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.worker import EngineRef, Worker, opened
from planish.optimizer.system.machine import available_memory, busy_share

CONFIDENCE = 0.95
OPENINGS = 8
"""Openings of each engine in one race."""
_FEWEST_OPENINGS = 3
"""Of fewer, an interval says nothing."""
_CERTAIN = 0.998
"""Confidence at which a race of two engines ends after the fewest openings. It is greater than that of the intervals,
because who looks twice errs twice."""
_ROUNDS = 15
"""Rounds of one opening: in each, every engine has a turn."""
_FEWEST_ROUNDS = 2
_CALLS = 6
"""Calls of a turn. The first one warms the caches and is not counted."""
_TURN_SECONDS = 0.4
"""Seconds after which a turn ends early."""
_OUTLIER = 1.5
"""A turn that takes this many times the median of its engine is an outlier."""
_ROOM = 1.5
"""The twin is opened if as many times the memory of the first engine is left."""

Turns = Sequence[Sequence[float]]
"""Milliseconds of each turn of an engine, by opening."""


@dataclass(frozen=True)
class Timing:
    """Latency of one engine in milliseconds, and its speed-up over the first engine of the same race."""

    median_ms: float
    speedup: float
    low: float
    """Lower end of the confidence interval of the speed-up."""
    high: float
    rounds: int
    outliers: float = 0.0
    """Share of the turns that took half as long again as the median."""
    busy: float = 0.0
    """Share of the processors that other processes used meanwhile."""

    @property
    def faster(self) -> bool:
        """True if the whole interval is above one."""
        return self.low > 1.0


@dataclass(frozen=True)
class Race:
    """Turns of engines in alternation."""

    turns: Sequence[list[list[float]]]
    """Of each engine, by opening: turn i of one corresponds to turn i of every other."""
    twin: list[list[float]] = field(default_factory=list)
    """Turns of the first engine's second copy; none in openings where memory did not hold it."""
    busy: list[float] = field(default_factory=list)
    """Share of the processors that other processes used, by opening."""

    def timings(self, base: int = 0) -> list[Timing]:
        """The timing of each engine, relative to one of them."""
        timings = [timing(self.turns[base], turns) for turns in self.turns]
        apart = _apart(self.turns[0], self.twin)
        busy = statistics.mean(self.busy) if self.busy else 0.0
        return [each if index == base else _widened(each, apart, busy) for index, each in enumerate(timings)]


def time_against_first(
    engines: Sequence[EngineRef], inputs: Sequence[Arrays], *, seconds: float = 60.0
) -> list[Timing]:
    """Time engines in alternation, each on its own inputs; the first engine is the baseline.

    Ends after all openings; after three if they have taken ``seconds``, or if the race is of two engines and decided.
    """
    return time_interleaved(engines, inputs, seconds=seconds).timings()


def time_interleaved(
    engines: Sequence[EngineRef], inputs: Sequence[Arrays], *, seconds: float = 60.0, openings: int | None = None
) -> Race:
    """Time engines in alternation, each opened anew ``openings`` times (`OPENINGS` if None), but for no more than about
    ``seconds``.

    Each round gives each engine a turn of a few calls, in alternating order. The latency of a turn is the median of its
    calls. Ratios within a round are independent of slow drift of the machine.
    """
    race, openings = Race([[] for _ in engines]), openings or OPENINGS
    start = time.perf_counter()
    for number in range(openings):
        _open_and_time(race, engines, inputs, number, seconds / openings)
        late = time.perf_counter() - start > seconds
        if number + 1 >= _FEWEST_OPENINGS and (late or _decided(race)):
            break
    return race


def _open_and_time(
    race: Race, engines: Sequence[EngineRef], inputs: Sequence[Arrays], number: int, seconds: float
) -> None:
    """One opening of every engine: its turns are added to the race."""
    with ExitStack() as stack:
        workers = stack.enter_context(opened(engines))
        memory = [_warm(worker, feeds) for worker, feeds in zip(workers, inputs, strict=True)]
        if memory[0] * _ROOM < available_memory():
            (twin,) = stack.enter_context(opened(engines[:1]))
            _warm(twin, inputs[0])
            workers.append(twin)
        race.busy.append(busy_share())
        turns: list[list[float]] = [[] for _ in workers]
        start = time.perf_counter()
        for count in range(_ROUNDS):
            if count >= _FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            for index in _order(len(workers), number + count):
                turns[index].append(_turn(workers[index]))
    for so_far, new in zip(race.turns, turns, strict=False):  # the last may be the twin's
        so_far.append(new)
    race.twin.append(turns[-1] if len(workers) > len(engines) else [])


def _warm(worker: Worker, feeds: Arrays) -> int:
    """Run an engine and stop its process; returns its peak memory in bytes."""
    worker.run(feeds)
    worker.time(_CALLS, _TURN_SECONDS)
    memory = worker.memory()
    # A stopped process keeps its memory but takes no cores from the engine that is timed.
    worker.pause()
    return memory


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


def _decided(race: Race) -> bool:
    """True if two engines are so far apart that more openings cannot change which is faster."""
    if len(race.turns) != 2:
        return False
    low, high = interval(_ratios(*race.turns), _CERTAIN)
    return low > 1 or high < 1


def timing(base: Turns, turns: Turns) -> Timing:
    """Timing of an engine relative to a baseline, from paired turns."""
    ratios = _ratios(base, turns)
    low, high = interval(ratios)
    every = np.concatenate([np.asarray(opening) for opening in turns])
    median = float(np.median(every))
    outliers = float(np.mean(every > _OUTLIER * median))
    return Timing(median, statistics.geometric_mean(ratios), low, high, len(every), outliers)


def _ratios(base: Turns, turns: Turns) -> list[float]:
    """The median speed-up of each opening."""
    return [float(np.median(np.asarray(b) / np.asarray(t))) for b, t in zip(base, turns, strict=True)]


def interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the geometric mean of ratios, one of each opening (Student's t of their logarithms)."""
    from scipy.stats import t

    logs = np.log(ratios)
    if np.ptp(logs) == 0:
        return float(ratios[0]), float(ratios[0])
    half = float(t.ppf((1 + confidence) / 2, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    middle = statistics.mean(logs)
    return math.exp(middle - half), math.exp(middle + half)


def _apart(base: Turns, twin: Turns) -> float:
    """The ratio, at least one, by which the clock finds an engine and its twin apart."""
    both = [(b, t) for b, t in zip(base, twin, strict=False) if t]
    if not both:
        return 1.0
    ratio = statistics.geometric_mean(_ratios(*zip(*both, strict=True)))
    return max(ratio, 1 / ratio)


def _widened(measured: Timing, apart: float, busy: float) -> Timing:
    """The timing with an interval that reaches as far as a twin is apart: so much is found between equal engines."""
    low, high = min(measured.low, measured.speedup / apart), max(measured.high, measured.speedup * apart)
    return replace(measured, low=low, high=high, busy=busy)
