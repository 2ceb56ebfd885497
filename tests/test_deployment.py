"""What loaders get: the table of `benchmarks.deployment`, and how `tests.interop` chooses and judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.deployment import COLUMNS, deployed
from planish.optimizer import optimize
from tests.clocks import all_equal
from tests.interop import sampled, ways
from tests.zoo import Species, build


@pytest.mark.slow
def test_each_engine_is_opened_in_both_ways(tmp_path: Path) -> None:
    checkpoint = build(Species("bert", "feature-extraction"), tmp_path / "checkpoint")
    targets = ["onnxruntime", "openvino"]
    optimize(checkpoint, tmp_path / "out", targets=targets, pipeline="remove-unused-nodes", clock=all_equal)
    rows = deployed(tmp_path / "out")
    assert [row[2] for row, _ in rows] == ["onnxruntime", "onnxruntime", "openvino", "openvino"]
    told = [figures for row, figures in rows if row[3].startswith("options of the target")]
    assert [figures["budget"] for figures in told] == [[], []]
    assert all(figures[COLUMNS[4]] < 1e-4 for figures in told)
    plainly = next(figures for row, figures in rows if row[3].startswith("compile_model"))
    assert bool(plainly["budget"]) == ("precision=default" in plainly["opened"])
    for target in targets:
        (_, options, promise), *others = ways(tmp_path / "out", target)
        assert options == {}
        assert (promise is not None) == (target == "openvino" and "precision=default" in plainly["opened"])
        assert [promise for *_, promise in others] == [None] * (target == "openvino")


def test_samples_change_with_the_commit_and_cover_all_in_time() -> None:
    names = [f"type-{number}" for number in range(40)]
    assert sampled(names, 3, "a") == sampled(names[::-1], 3, "a")
    drawn = [set(sampled(names, 3, str(seed))) for seed in range(200)]
    assert {len(names) for names in drawn} == {3}
    assert set.union(*drawn) == set(names)


def test_properties_are_what_an_application_reads(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "planish.json").write_text(json.dumps({"targets": {"openvino": {"as_loaders_open": None}}}))
    (tmp_path / "openvino" / "openvino_properties.json").write_text('{"INFERENCE_PRECISION_HINT": "f32"}')
    properties = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    assert ways(tmp_path, "openvino") == [("without options", {}, None), ("its properties", properties, None)]
