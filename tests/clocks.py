"""Clocks for builds whose choice is not what a test is about: given timings instead of measured ones."""

from __future__ import annotations

from collections.abc import Sequence

from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import Timing

EQUAL, TWICE = Timing(1, 1, 1, 1, 1), Timing(1, 2, 2, 2, 1)


def all_equal(engines: Sequence[EngineRef], _: Sequence[Arrays]) -> list[Timing]:
    """No engine is faster than the plain one."""
    return [EQUAL] * len(engines)


def all_faster(engines: Sequence[EngineRef], _: Sequence[Arrays]) -> list[Timing]:
    """Every engine is twice as fast as the plain one."""
    return [EQUAL, *[TWICE] * (len(engines) - 1)]


def each_faster(engines: Sequence[EngineRef], _: Sequence[Arrays]) -> list[Timing]:
    """Each engine is twice as fast as the one before it."""
    return [Timing(1, 2.0**n, 2.0**n, 2.0**n, 1) for n in range(len(engines))]
