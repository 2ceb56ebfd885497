"""Measuring: intervals, alternation, and engines whose process dies."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest

from planish.optimizer.errors import BadInput, InternalError, NoAnswer, OutOfResources
from planish.optimizer.runtime.worker import EngineRef, Worker
from planish.optimizer.timing.interleaved import (
    Race,
    Timing,
    _decided,
    interval,
    time_against_first,
    time_interleaved,
    timing,
)

pytestmark = [pytest.mark.slow, pytest.mark.processes]

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[N, 4] x) => (float[N, 4] r) { r = Relu (x) }"""
CASE = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def engine(tmp_path: Path) -> EngineRef:
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "model.onnx")
    return EngineRef("onnxruntime{threads=1}", tmp_path / "model.onnx")


OPENINGS_OF_A_RACE = 8


def openings(
    speedup: float, luck: float, rng: np.random.Generator, count: int = OPENINGS_OF_A_RACE
) -> list[list[float]]:
    """Milliseconds of an engine: turns of one opening share its luck."""
    return [list(10 / speedup * rng.lognormal(0, luck) * rng.lognormal(0, 0.01, 6)) for _ in range(count)]


def raced(speedup: float, luck: float, rng: np.random.Generator) -> Timing:
    base, other, twin = (openings(how, luck, rng) for how in (1.0, speedup, 1.0))
    return Race([base, other], twin).timings()[1]


def test_equal_engines_are_found_equal_as_often_as_the_interval_says() -> None:
    rng = np.random.default_rng(0)
    excluded = [not found.low <= 1 <= found.high for found in (raced(1.0, 0.02, rng) for _ in range(500))]
    assert 0.01 <= np.mean(excluded) <= 0.06


def test_a_gain_of_three_percent_is_found_where_openings_are_alike() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([raced(1.03, 0.007, rng).faster for _ in range(300)]) >= 0.9


def test_a_twin_that_is_found_to_differ_widens_every_interval() -> None:
    rng = np.random.default_rng(0)
    base, other = openings(1.0, 0.001, rng), openings(1.02, 0.001, rng)
    alone = Race([base, other]).timings()[1]
    with_twin = Race([base, other], openings(0.96, 0.001, rng)).timings()
    assert alone.faster
    assert not with_twin[1].faster
    assert with_twin[1].low == pytest.approx(alone.speedup * 0.96, rel=0.01)
    assert with_twin[1].speedup == alone.speedup
    assert (with_twin[0].low, with_twin[0].high) == (1.0, 1.0)


def test_the_interval_is_that_of_the_geometric_mean() -> None:
    assert interval([1.5, 1.5, 1.5]) == (1.5, 1.5)
    low, high = interval([1.1, 1.2, 1.3])
    assert math.sqrt(low * high) == pytest.approx((1.1 * 1.2 * 1.3) ** (1 / 3))
    # Student's t with two degrees of freedom: 4.303 standard errors.
    assert math.log(high / low) / 2 == pytest.approx(
        4.3027 * np.std(np.log([1.1, 1.2, 1.3]), ddof=1) / math.sqrt(3), rel=1e-4
    )


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down tenfold slows both: the ratio must not notice."""
    drift = np.linspace(1, 10, 30).reshape(5, 6)
    found = timing((4.0 * drift).tolist(), (2.0 * drift).tolist())
    assert (found.speedup, found.low, found.high, found.faster) == (2.0, 2.0, 2.0, True)


def test_outliers_are_counted() -> None:
    assert timing([[1.0] * 10], [[1.0] * 9 + [1.6]]).outliers == 0.1


def test_a_race_compares_with_the_first(engine: EngineRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.optimizer.timing.interleaved.OPENINGS", 3)
    first, second = time_against_first([engine, engine], [CASE, CASE], seconds=0.1)
    assert (first.speedup, first.low, first.high) == (1.0, 1.0, 1.0)
    assert second.low <= second.speedup <= second.high
    assert first.rounds == second.rounds >= 6  # three openings of two rounds
    assert 0 <= second.busy <= 1


def test_a_race_of_two_ends_early_only_where_it_is_decided() -> None:
    rng = np.random.default_rng(0)
    assert _decided(Race([openings(how, 0.005, rng, 3) for how in (1.0, 2.0)]))
    assert not _decided(Race([openings(how, 0.005, rng, 3) for how in (1.0, 1.03)]))
    assert not _decided(Race([openings(how, 0.005, rng, 3) for how in (1.0, 2.0, 2.0)]))


def test_the_twin_is_left_out_where_memory_is_short(engine: EngineRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.optimizer.timing.interleaved.available_memory", lambda: 0)
    race = time_interleaved([engine], [CASE], seconds=0.1)
    assert race.twin == [[]] * len(race.turns[0])


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


def test_an_engine_that_does_not_answer_is_ended(engine: EngineRef, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(engine) as worker:
        monkeypatch.setattr(worker, "_patience", 0.5)
        worker.pause()  # as good as one that spins for ever
        with pytest.raises(NoAnswer, match="the process of this engine gave no answer for 0 s, and was ended"):
            worker.run(CASE)
        assert worker.child.wait() == -signal.SIGKILL


def test_large_engines_may_take_longer(engine: EngineRef) -> None:
    """Weights lie beside the model, in files of any name."""
    alone = engine.patience
    with (engine.path.parent / "shared.data").open("wb") as file:
        file.truncate(400_000_000)
    assert engine.patience == pytest.approx(alone + 100)


@pytest.mark.parametrize(("how", "kind"), [(signal.SIGKILL, OutOfResources), (signal.SIGSEGV, InternalError)])
def test_a_worker_that_dies_takes_nobody_along(how: signal.Signals, kind: type[Exception], engine: EngineRef) -> None:
    with Worker(engine) as worker:
        os.kill(worker.child.pid, how)
        with pytest.raises(kind, match=rf"the process of this engine ended \(signal {how.value}\)"):
            worker.run(CASE)
