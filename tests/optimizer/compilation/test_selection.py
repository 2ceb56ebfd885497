"""Which engine is called faster, over all shapes together."""

from __future__ import annotations

import math

import pytest

from planish.optimizer.compilation.selection import fastest, is_faster
from planish.optimizer.timing.interleaved import Timing


def timed(*spans: tuple[float, float]) -> dict[str, Timing]:
    """Speed-ups at several shapes, each with the lower end of its interval."""
    return {str(n): Timing(1.0, speedup, low, 2 * speedup - low, 9) for n, (speedup, low) in enumerate(spans)}


def test_one_shape_needs_its_whole_interval() -> None:
    assert is_faster(timed((1.1, 1.01)))
    assert not is_faster(timed((1.1, 0.99)))


@pytest.mark.parametrize("count", [2, 4])
def test_errors_of_shapes_are_independent(count: int) -> None:
    low = 1.1 / math.exp(0.12)  # below one; four such errors add up to twice one of them, their gains to four times
    assert low < 1
    assert is_faster(timed(*[(1.1, low)] * count))
    assert not is_faster(timed(*[(1.0, low)] * count))


def test_a_loss_at_one_shape_counts() -> None:
    assert not is_faster(timed((1.1, 1.09), (0.9, 0.89)))


def test_another_engine_must_be_clearly_faster_than_the_best() -> None:
    assert fastest([timed((1.2, 1.15)), timed((1.3, 1.19)), timed((1.4, 1.21))]) == 2
    assert fastest([timed((1.2, 1.15)), timed((1.3, 1.19))]) == 0
