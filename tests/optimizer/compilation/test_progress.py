"""Progress: what a notebook, a program and a log are told while they wait."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import onnx.parser
import pytest

from planish.backends.openvino.target import OpenVino
from planish.optimizer import bench, optimize, verify
from planish.optimizer.compilation import engine
from planish.optimizer.compilation.progress import Stages
from planish.optimizer.compilation.verdicts import Verdict
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.reference import Reference
from planish.optimizer.interfaces import registry
from planish.optimizer.runtime.cases import load_cases, save_cases
from tests.clocks import all_equal

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[rows,4] x) => (float[rows,4] y) { i = Identity (x)  y = Relu (i) }"""


@pytest.mark.slow
def test_stages_are_told_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    told: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))

    caplog.set_level(logging.DEBUG, "planish")
    optimize(tmp_path / "model.onnx", tmp_path / "out", pipeline="fuse-gelu", progress=progress)
    names = [name for name, _, _ in told]
    assert names[0] == "lowering"
    assert names[-1] == "report"
    assert {f"onnxruntime: {what}" for what in ("passes", "emission", "check", "measurement")} <= set(names)
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert {total for _, _, total in told} == {len(told)}
    lines = [record.getMessage() for record in caplog.records if record.name == "planish"]
    assert f"1 of {len(told)}: lowering" in lines
    assert any(line.startswith("report took ") for line in lines)
    assert any(line.startswith("no pass changed anything for onnxruntime") for line in lines)

    told.clear()
    assert verify(tmp_path / "out", progress=progress)["onnxruntime"].problems == ()
    assert told == [("onnxruntime: check", 0, 1)]
    told.clear()
    bench([tmp_path / "out"], shapes=[{"rows": 1}, {"rows": 2}], progress=progress)
    assert told == [("timing model at rows=1", 0, 2), ("timing model at rows=2", 1, 2)]


@pytest.mark.slow
def test_the_number_of_stages_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that is looked at once more, and one that is not measured."""
    default = registry.backend("openvino{precision=default}")
    monkeypatch.setattr(OpenVino, "as_loaders_open", lambda _: default)  # on machines without bf16 as well
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    told: list[tuple[str, int, int]] = []
    optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        targets=["openvino", "tensorrt", "onnxruntime"],
        progress=lambda *said: told.append(said),
        clock=all_equal,
    )
    assert {total for _, _, total in told} == {14}
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert told[-1] == ("report", 13, 14)
    assert ("openvino: check as loaders open it", 5, 14) in told
    assert ("tensorrt: passes", 5, 14) in told
    assert ("onnxruntime: passes", 9, 14) in told


@pytest.mark.slow
def test_building_an_engine_again_is_no_further_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that strays too far is quantized less: passes, emission and check are told twice, and counted once."""
    strayed, answers = iter([True, True]), iter([["a product"]])
    violations = vars(Verdict)["violations"].fget
    monkeypatch.setattr(
        Verdict, "violations", property(lambda own: ["far"] if next(strayed, False) else violations(own))
    )
    monkeypatch.setattr(engine, "products_of", lambda *_: next(answers, []))
    monkeypatch.setattr(engine, "STRICTER", (0.5,))
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    told: list[tuple[str, int, int]] = []
    result = optimize(
        tmp_path / "model.onnx", tmp_path / "out", progress=lambda *said: told.append(said), clock=all_equal
    )
    assert any("rounding is held to 0.5" in note for note in result.notes)
    assert [name for name, _, _ in told].count("onnxruntime: emission") == 2
    assert {total for _, _, total in told} == {6}
    assert told[-1] == ("report", 5, 6)


def test_a_part_that_nobody_knew_of_does_not_count() -> None:
    told: list[tuple[str, int, int]] = []
    stages = Stages(lambda *said: told.append(said), 2)
    with stages.stage("check"):
        pass
    with stages.stage("check", counts=False):
        pass
    with stages.stage("report"):
        pass
    assert told == [("check", 0, 2), ("check", 1, 2), ("report", 1, 2)]


@pytest.mark.slow
def test_an_exception_of_progress_ends_the_run(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")

    def stop(stage: str, done: int, total: int) -> None:
        if stage.endswith("passes"):
            raise InterruptedError(stage)

    with pytest.raises(InterruptedError):
        optimize(tmp_path / "model.onnx", tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_is_done_in_a_stage_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, int, int]] = []
    stages = Stages(lambda *said: told.append(said), 2)
    with stages.stage("one"):
        stages.tell("one: a part")
    with stages.stage("two"):
        pass
    assert told == [("one", 0, 2), ("one: a part", 0, 2), ("two", 1, 2)]
    assert list(stages.seconds) == ["one", "two"]


def test_a_process_of_the_original_may_be_asked_for_no_prompts(tmp_path: Path) -> None:
    """Encoders have none: the file that hands them over is empty, and that is no fault."""
    save_cases([], tmp_path / "prompts.safetensors")
    assert load_cases(tmp_path / "prompts.safetensors") == []
    for kind in ("inputs", "outputs"):
        save_cases([], tmp_path / f"{kind}.safetensors")
    with pytest.raises(BadInput, match="its 0 inputs and 0 outputs do not belong together"):
        Reference.load(tmp_path, {}, "nobody")
