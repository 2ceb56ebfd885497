"""What ONNX Runtime computes of ONNX's own backend tests, it computes after our passes too."""

from __future__ import annotations

import pytest

from tests import node_tests


@pytest.mark.breadth
@pytest.mark.timeout(1500)
def test_no_case_that_the_runtime_passes_is_lost() -> None:
    verdicts = node_tests.judge_all()
    failed = [f"{v.case} ({v.form}, {v.pipeline}): {v.reason}" for v in verdicts if v.outcome == "failed"]
    assert not failed, "\n".join(failed)
    for (form, targets), row in node_tests.count(verdicts).items():
        assert row.counts["unchanged"] > 1000, (form, targets, row.counts)
        assert set(row.reasons) <= set(node_tests.REASONS.values())
