"""The harness itself: what counts as a failure, and that a case is the same whenever its seed is."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from planish.optimizer.errors import BadInput, InternalError
from tests.fuzz import Wrong, graphs, harness


def test_what_counts_as_a_failure() -> None:
    def case(seed: int, _: Path) -> str:
        if seed == 0:
            return "equal"
        raise (BadInput("bad"), InternalError("ours"), Wrong("differs"), KeyError("x"), MemoryError())[seed - 1]

    endings = [harness.outcome(case, seed) for seed in range(6)]
    assert [ending["failed"] for ending in endings] == [False, False, True, True, True, False]
    assert [ending["kind"] for ending in endings[:3]] == ["equal", "exit code 3", "exit code 70"]


def test_a_seed_is_one_file(tmp_path: Path) -> None:
    files = [graphs.write(random.Random(seed), tmp_path).read_bytes() for seed in (*range(50), *range(50))]
    assert files[:50] == files[50:]
    assert len(set(files[:50])) > 40


def test_libraries_that_print_are_caught() -> None:
    with pytest.raises(Wrong, match="a library said: hello"), graphs.silence():
        os.write(1, b"hello")


@pytest.mark.breadth
def test_a_case_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all every case hangs; the next worker starts none the less."""
    monkeypatch.setattr(harness, "SECONDS", -1.0)
    monkeypatch.setattr(harness, "_WATCH_SECONDS", 0.0)
    report = harness.fuzz("graphs", range(2))
    assert [ending.kind for ending in report.failures] == ["longer than -1 s"] * 2
