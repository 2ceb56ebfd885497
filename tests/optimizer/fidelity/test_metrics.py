"""Metrics and budgets on outputs whose difference is known."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer import Budget
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.fidelity.metrics import compare, log_probabilities
from planish.optimizer.ir.program import Role, Signature, TensorSpec
from planish.optimizer.runtime.cases import log_likelihoods, thin

FLOAT, INT = ir.DataType.FLOAT, ir.DataType.INT64
MASK = TensorSpec("mask", INT, ("batch", "sequence"), Role.MASK)
SCORES = TensorSpec("logits", FLOAT, ("batch", "sequence", 3), Role.LOGITS)
SPANS = TensorSpec("spans", FLOAT, ("batch", "sequence"), Role.LOGITS)
SIGNATURE = Signature((MASK,), (SCORES, SPANS))


def difference(
    expected: np.ndarray, actual: np.ndarray, mask: list[list[int]], name: str = "logits"
) -> dict[str, float]:
    found = compare(SIGNATURE, [{"mask": np.array(mask)}], [{name: expected}], [{name: actual}])
    return dict(found.outputs[name])


def test_equal_outputs() -> None:
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    metrics = difference(array, array.copy(), [[1, 1]])
    assert metrics == {
        "max_abs": 0,
        "max_rel": 0,
        "cosine": pytest.approx(1),
        "cosine_min": pytest.approx(1),
        "top1": 1,
    }


def test_differences_are_absolute_relative_to_the_scale_and_by_direction() -> None:
    expected = np.array([[[1, 0, 0], [0, 4, 0]]], np.float32)
    actual = np.array([[[0, 1, 0], [0, 4, 0]]], np.float32)
    metrics = difference(expected, actual, [[1, 1]])
    assert metrics == {"max_abs": 1, "max_rel": 0.25, "cosine": 0.5, "cosine_min": 0, "top1": 0.5}


def test_padded_positions_do_not_count() -> None:
    expected = np.array([[[1, 2, 3], [7, 7, 7]]], np.float32)
    actual = np.array([[[1, 2, 3], [0, 9, np.nan]]], np.float32)
    assert difference(expected, actual, [[1, 0]])["max_abs"] == 0


def test_padding_along_the_last_axis_is_left_out_of_vectors_and_of_the_best_entry() -> None:
    expected, actual = np.array([[1.0, 2.0, 9.0]]), np.array([[1.0, 2.0, -9.0]])
    metrics = difference(expected, actual, [[1, 1, 0]], "spans")
    assert metrics == pytest.approx({**metrics, "max_abs": 0, "top1": 1, "cosine": 1})


def test_not_a_number_is_infinitely_far_unless_expected() -> None:
    array = np.ones((1, 1, 3), np.float32)
    broken = array.copy()
    broken[0, 0, 1] = np.nan
    assert difference(array, broken, [[1]])["max_abs"] == math.inf
    assert difference(broken, broken.copy(), [[1]])["max_abs"] == 0


def test_masked_scores_do_not_set_the_scale() -> None:
    expected = np.array([[[1.0, 2.0, -3.4e38]]], np.float32)
    actual = np.array([[[1.0, 2.5, -3.4e38]]], np.float32)
    assert difference(expected, actual, [[1]])["max_rel"] == 0.25


def test_a_missing_or_misshapen_output_is_an_error() -> None:
    array = np.ones((1, 1, 3), np.float32)
    with pytest.raises(ValueError, match="is missing"):
        compare(SIGNATURE, [{}], [{"logits": array}], [{}])
    with pytest.raises(ValueError, match="has shape"):
        compare(SIGNATURE, [{}], [{"logits": array}], [{"logits": array[0]}])


def test_budgets_read_and_judge() -> None:
    budget = Budget.parse(["cosine>=0.9", " max_abs <= 1e-3 "])
    assert str(budget) == "cosine>=0.9 max_abs<=0.001"
    array = np.ones((1, 1, 3), np.float32)
    far = compare(SIGNATURE, [{}], [{"logits": array}], [{"logits": -array}])
    assert len(budget.violations(far)) == 2
    with pytest.raises(CheckFailed, match=r"cosine of logits is -1, the budget asks cosine>=0\.9"):
        budget.check(far, where="here")
    budget.check(compare(SIGNATURE, [{}], [{"logits": array}], [{"logits": array}]), where="here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine", "cannot read the budget"),
        ("cosin>=0.9", "unknown metric 'cosin' .did you mean 'cosine'"),
        ("cosine<=0.9", "is written cosine>=X"),
        ("max_abs>=0.9", "is written max_abs<=X"),
        ("cosine>=0.9.9", "is not a number"),
    ],
)
def test_budgets_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget.parse([text])


def test_figures_are_rounded_away_from_perfection() -> None:
    array = np.array([[[1.0, 2.0, 3.0]]])
    found = compare(SIGNATURE, [{}], [{"logits": array}], [{"logits": array + np.array([0, 0, 0.0012345])}])
    rounded = found.rounded().outputs["logits"]
    assert rounded["max_abs"] == 1.23e-3
    assert 0 < 1 - rounded["cosine"] < 1e-6


def test_likely_words_in_single_precision() -> None:
    rng = np.random.default_rng(0)
    scores, shown = (8 * rng.standard_normal((2, 5, 999))).astype(np.float32), rng.random((2, 5)) < 0.7
    scores[0, 0, 3] = -np.inf
    words = rng.integers(0, 999, int(shown.sum()))
    wanted = np.take_along_axis(log_probabilities(scores[shown]), words[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(log_likelihoods(scores, shown, words), wanted, atol=1e-5)


def test_scores_kept_in_part_have_the_perplexity_and_the_best_entries_of_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    ids = TensorSpec("input_ids", INT, ("batch", "sequence"), Role.TOKENS, 96)
    mask = TensorSpec("attention_mask", INT, ("batch", "past + sequence"), Role.MASK)
    scores = TensorSpec("logits", FLOAT, ("batch", "sequence", 96), Role.LOGITS)
    cache = TensorSpec("past_key_values.0.key", FLOAT, ("batch", 1, "past", 2), Role.CACHE)
    signature = Signature((ids, mask, cache), (scores,))
    feeds = {"input_ids": rng.integers(0, 96, (2, 5)), "attention_mask": np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
    expected = rng.standard_normal((2, 5, 96)).astype(np.float32)
    actual = expected + 0.5 * rng.standard_normal(expected.shape).astype(np.float32)
    whole = compare(signature, [feeds], [{"logits": expected}], [{"logits": actual}]).outputs["logits"]
    monkeypatch.setattr("planish.optimizer.runtime.cases._ELEMENTS", 300)
    kept = [thin(feeds, {"logits": each}) for each in (expected, actual)]
    assert kept[0]["logits"].shape == (2, 5, 24)
    found = compare(signature, [feeds], [kept[0]], [kept[1]]).outputs["logits"]
    assert whole["top1"] < 1
    assert found["perplexity"] == pytest.approx(whole["perplexity"])
    assert found["top1"] == whole["top1"]


def test_a_condition_that_nothing_measured_is_told() -> None:
    budget = Budget.parse(["perplexity<=1.02x", "max_abs<=1"])
    array = np.ones((1, 2, 3), np.float32)
    found = compare(SIGNATURE, [{}], [{"logits": array}], [{"logits": array}])
    assert budget.violations(found) == ["nothing measured perplexity, the budget asks perplexity<=1.02x"]
