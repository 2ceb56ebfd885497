"""Metrics of continuations."""

from __future__ import annotations

import numpy as np
import pytest

from planish.optimizer.fidelity.generation_metrics import compare_continuations
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation, score_teacher_forced
from tests.optimizer.runtime.test_generation import Scripted


def continuation(scores: list[list[list[float]]]) -> GreedyContinuation:
    array = np.array(scores, np.float32)
    return GreedyContinuation({}, 0, np.zeros((array.shape[1], 0), np.int64), array.argmax(-1), array)


def metrics(wanted: list[list[list[float]]], given: list[list[list[float]]]) -> dict[str, float]:
    found = compare_continuations([(continuation(wanted), np.array(given, np.float32))])
    return dict(found.outputs["next token"])


def test_equal_scores_diverge_nowhere() -> None:
    scores = [[[1.0, 2.0, 0.0]], [[0.0, 5.0, 1.0]]]
    assert metrics(scores, scores) == {"kl": 0.0, "top1": 1.0, "greedy": 1.0}


def test_what_follows_a_divergence_does_not_count_as_greedy() -> None:
    wanted = [[[9.0, 0.0]], [[9.0, 0.0]], [[9.0, 0.0]], [[9.0, 0.0]]]
    given = [[[9.0, 0.0]], [[0.0, 9.0]], [[9.0, 0.0]], [[9.0, 0.0]]]
    found = metrics(wanted, given)
    assert (found["top1"], found["greedy"]) == (0.75, 0.25)


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    one, other = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    found = metrics([[list(np.log(one))]], [[list(np.log(other))]])
    assert found["kl"] == pytest.approx(float((one * np.log(one / other)).sum()), rel=1e-5)


def test_tokens_that_are_equally_likely_are_the_same() -> None:
    tie, clear = [[[10.0, 9.99999, 0.0]]], [[[10.0, 9.9, 0.0]]]
    other = [[[9.99999, 10.0, 0.0]]]
    assert metrics(tie, other)["greedy"] == 1.0
    assert metrics(clear, other)["greedy"] == 0.0


def test_scores_that_are_not_numbers_are_infinitely_far() -> None:
    assert metrics([[[1.0, 2.0]]], [[[np.nan, 2.0]]])["kl"] == np.inf


def test_an_engine_is_fed_the_tokens_of_the_original() -> None:
    class Recording(Scripted):
        def advance(self, tokens: np.ndarray) -> np.ndarray:
            seen.append((list(tokens), bool(swapped)))
            return super().advance(tokens)

        def select(self, rows: np.ndarray) -> None:
            swapped.append(list(rows))

    seen: list[tuple[list[int], bool]] = []
    swapped: list[list[int]] = []
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    wanted = GreedyContinuation({}, 2, np.zeros((2, 0), np.int64), tokens, np.zeros((3, 2, 8), np.float32))
    score_teacher_forced(Recording([[0, 0, 0], [0, 0, 0]]), wanted)
    assert seen == [([1, 2], False), ([4, 3], True)]
    assert swapped == [[1, 0]]
