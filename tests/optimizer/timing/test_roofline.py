"""How far operators are from what the machine can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planish.optimizer import optimize
from planish.optimizer.driver import bench
from planish.optimizer.errors import NoAnswer
from planish.optimizer.interfaces.counters import OperatorTime, Probe
from planish.optimizer.system.staging import MEASUREMENTS
from planish.optimizer.timing import peaks as measured
from planish.optimizer.timing import roofline as lines
from planish.optimizer.timing.peaks import Peaks, measure_multiply_adds, measure_reading
from planish.optimizer.timing.roofline import Roofline
from tests.clocks import all_equal
from tests.conftest import Planish

PEAKS = Peaks({"f32": 1e9, "i8": 4e9}, weights=1e9, activations=2e9)


def _product(name: str, milliseconds: float, arithmetic: str, adds: int, weights: int = 0) -> OperatorTime:
    return OperatorTime(name, "MatMul", "", milliseconds, arithmetic, adds, weights, 0)


def test_the_roof_of_a_product_is_the_larger_of_two_times() -> None:
    computing, reading = _product("a", 4.0, "f32", 2_000_000, 1_000_000), _product("b", 4.0, "i8", 4_000, 3_000_000)
    line = Roofline(PEAKS, [computing, reading, OperatorTime("c", "Add", "", 2.0, "f32", activation_bytes=10_000_000)])
    assert [(row.name, row.achieved) for row in line.by_operator()] == [("a", 0.5), ("b", 0.75), ("c", 0.0)]
    assert line.roof_milliseconds == pytest.approx(2.0 + 3.0)
    assert line.milliseconds == pytest.approx(10.0)


def test_operators_of_a_kind_and_type_are_one_row() -> None:
    times = [
        _product("a", 1.0, "f32", 500_000),
        _product("b", 3.0, "f32", 500_000),
        _product("c", 1.0, "i8", 4_000_000),
    ]
    first, second = Roofline(PEAKS, times).by_kind()
    assert (first.name, first.arithmetic, first.count, first.milliseconds, first.share) == (
        "MatMul",
        "f32",
        2,
        4.0,
        0.8,
    )
    assert [first.rate, first.achieved] == pytest.approx([2.5e8, 0.25])
    assert second.arithmetic == "i8"
    assert second.achieved == pytest.approx(1.0)


def test_a_type_whose_peak_nobody_measured_is_bounded_by_memory_alone() -> None:
    (row,) = Roofline(PEAKS, [_product("a", 4.0, "f16", 10**12, 1_000_000)]).by_operator()
    assert row.achieved == pytest.approx(0.25)


@pytest.mark.processes
def test_memory_is_read_faster_where_it_fits_into_caches() -> None:
    small, large = measure_reading([0, 1 << 40])
    assert small > large > 1e8


@pytest.mark.processes
@pytest.mark.breadth
def test_peaks_are_measured_for_every_type_that_a_runtime_multiplies_in() -> None:
    rates = measure_multiply_adds()
    assert {"f32", "i8"} <= set(rates)
    assert min(rates.values()) > 1e8


@pytest.fixture
def _known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_multiply_adds", lambda: PEAKS.multiply_adds)
    monkeypatch.setattr(lines, "measure_reading", lambda sizes: [1e9 for _ in sizes])


@pytest.mark.usefixtures("_known_peaks")
def test_the_measurements_of_a_build_hold_rooflines_on_request(tiny: Path, tmp_path: Path) -> None:
    shapes = [{"batch": 1, "sequence": 8}]
    targets = ("onnxruntime", "openvino", "tensorrt")
    optimize(tiny, tmp_path / "out", targets=targets, shapes=shapes, roofline=True, clock=all_equal)
    found = json.loads((tmp_path / "out" / MEASUREMENTS).read_text())["targets"]
    assert found["tensorrt"]["roofline"] == {}  # it cannot run here
    for name in ("onnxruntime", "openvino"):
        (line,) = found[name]["roofline"].values()
        assert sum(row["milliseconds"] for row in line["by_kind"]) == pytest.approx(line["milliseconds"])
        assert len(line["by_operator"]) == sum(row["count"] for row in line["by_kind"])
    page = (tmp_path / "out" / "measurements.html").read_text()
    assert "onnxruntime: roofline at batch=1,sequence=8" in page
    assert 'src="measurements.html"' in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("_known_peaks")
def test_a_build_does_not_fail_for_a_roofline(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Roofline:
        raise NoAnswer("the process of this engine gave no answer")

    monkeypatch.setattr("planish.optimizer.compilation.rooflines.roofline", broken)
    result = optimize(tiny, tmp_path / "out", roofline=True, clock=all_equal)
    assert any(note.endswith(": the process of this engine gave no answer") for note in result.notes)
    assert result.measurements["targets"]["onnxruntime"]["roofline"] == {}


@pytest.mark.usefixtures("_known_peaks")
def test_bench_prints_rooflines_beside_timings(
    tiny: Path, tmp_path: Path, command: Planish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "time_against_first", all_equal)
    optimize(tiny, tmp_path / "out", clock=all_equal)
    words = ("bench", tmp_path / "out", "--shape", "batch=1,sequence=8", "--roofline")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "peaks of this machine: 10⁹ multiply-adds/s f32 1, i8 4" in done.stdout
    assert "of the peak" in done.stdout
    done = command(*words, "--json", "-")
    (row,) = json.loads(done.stdout)
    assert row["roofline"]["peaks"]["multiply_adds"] == {"f32": 1e9, "i8": 4e9}


def test_each_probe_is_a_product_of_the_type_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(range(1, 99))
    tried: list[str] = []

    def rate(probe: Probe, rows: int) -> float:
        tried.append(f"{probe.target} {probe.arithmetic} {rows}")
        return float(next(rates))

    monkeypatch.setattr(measured, "_rate", rate)
    found = measure_multiply_adds()
    assert {"onnxruntime f32 256", "onnxruntime i8 1024"} <= set(tried)
    assert max(found.values()) == len(tried)
