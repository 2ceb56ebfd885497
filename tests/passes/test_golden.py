"""Every golden case: the graph comes out as written, stays valid, and computes what it did."""

from __future__ import annotations

import numpy as np
import pytest

from planish.optimizer import Pipeline
from tests import golden

CASES = list(golden.read_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path.stem}-{case.name}")
def test_golden(case: golden.Case, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        golden.update([other for other in CASES if other.path == case.path])
        pytest.skip("rewritten: look at the difference")
    before = golden.outputs(case.model())
    model, refusals = golden.run(case)
    assert golden.text_of(model) == case.out
    reasons = [f"{refusal.reason} {refusal.culprit}" for refusal in refusals]
    for wanted in case.refused:
        assert any(wanted in reason for reason in reasons), (wanted, reasons)
    tolerance = float(case.settings.get("tolerance", "1e-5"))
    for one, other in zip(before, golden.outputs(model), strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance)


EXACT = [case for case in CASES if all(step.exact for step in Pipeline.parse(case.pipeline).passes)]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: f"{case.path.stem}-{case.name}")
def test_running_twice_is_running_once(case: golden.Case) -> None:
    once, _ = golden.run(case)
    twice = Pipeline.parse(case.pipeline).run(once.clone())
    assert golden.text_of(twice.model) == golden.text_of(once)
