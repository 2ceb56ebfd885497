"""Graphs of some seeds; `python -m tests.fuzz graphs --seeds A:B` tries as many as one likes."""

from __future__ import annotations

import pytest

from tests.fuzz import graphs, harness


@pytest.mark.slow
def test_a_few_graphs_end_well() -> None:
    endings = [harness.outcome(graphs.case, seed) for seed in range(15)]
    assert [ending for ending in endings if ending["failed"]] == []
    assert {"equal", "exit code 3"} <= {ending["kind"] for ending in endings}


@pytest.mark.breadth
def test_some_hundred_graphs_end_well() -> None:
    report = harness.fuzz("graphs", range(100, 600))
    assert report.failures == [], report
