"""Measuring: intervals, alternation, and engines whose process dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest

from planish.optimizer.errors import BadInput, InternalError, OutOfResources
from planish.optimizer.runtime.worker import EngineRef, Worker
from planish.optimizer.timing.interleaved import interval, time_against_first, timing

pytestmark = pytest.mark.slow

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[N, 4] x) => (float[N, 4] r) { r = Relu (x) }"""
CASE = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def engine(tmp_path: Path) -> EngineRef:
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "model.onnx")
    return EngineRef("onnxruntime{threads=1}", tmp_path / "model.onnx")


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 1.0 <= high for low, high in (interval(rng.lognormal(0, 0.2, 25)) for _ in range(300))]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_the_interval_is_the_same_for_the_same_values() -> None:
    values = np.random.default_rng(1).normal(2, 0.1, 20)
    assert interval(values) == interval(values.copy())
    assert interval(np.array([1.5, 1.5, 1.5])) == (1.5, 1.5)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down tenfold slows both: the ratio must not notice."""
    drift = np.linspace(1, 10, 30)
    found = timing(list(4.0 * drift), list(2.0 * drift))
    assert (found.speedup, found.low, found.high, found.faster) == (2.0, 2.0, 2.0, True)


def test_a_race_compares_with_the_first(engine: EngineRef) -> None:
    first, second = time_against_first([engine, engine], [CASE, CASE], seconds=0.1)
    assert (first.speedup, first.low, first.high) == (1.0, 1.0, 1.0)
    assert second.low <= second.speedup <= second.high
    assert first.rounds == second.rounds >= 5


def test_a_worker_computes_and_tells_its_memory(engine: EngineRef) -> None:
    with Worker(engine) as worker:
        np.testing.assert_array_equal(worker.run(CASE)["r"], np.maximum(CASE["x"], 0))
        assert len(worker.time(4, 10.0)) == 4
        assert worker.memory() > 1 << 20


def test_what_a_worker_raises_is_raised_here(engine: EngineRef, tmp_path: Path) -> None:
    with Worker(engine) as worker:
        with pytest.raises(BadInput, match="has no input 'y'"):
            worker.run({"y": CASE["x"]})
        worker.run(CASE)  # and it lives on
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(BadInput), Worker(EngineRef("onnxruntime", tmp_path / "broken.onnx")):
        pass


@pytest.mark.parametrize(("how", "kind"), [(signal.SIGKILL, OutOfResources), (signal.SIGSEGV, InternalError)])
def test_a_worker_that_dies_takes_nobody_along(how: signal.Signals, kind: type[Exception], engine: EngineRef) -> None:
    with Worker(engine) as worker:
        os.kill(worker.child.pid, how)
        with pytest.raises(kind, match=rf"the process of this engine ended \(signal {how.value}\)"):
            worker.run(CASE)
