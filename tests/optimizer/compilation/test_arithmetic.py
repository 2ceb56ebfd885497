"""The arithmetic of an engine: the runtime's own where that keeps the budget, float32 elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planish.backends.openvino.target import PROPERTIES, OpenVino
from planish.optimizer import optimize, verify
from planish.optimizer.compilation import candidates
from planish.optimizer.compilation.emission import PlainEngine
from planish.optimizer.compilation.job import Clock, Job
from planish.optimizer.compilation.options import BuildOptions
from planish.optimizer.compilation.verdicts import Verdict, judge
from planish.optimizer.errors import BadInput, NoAnswer
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.recipe import Recipe, When
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import target_at
from tests.backends.conftest import contents
from tests.clocks import all_equal, all_faster

DEFAULT = "openvino{precision=default}"


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that computes in bfloat16 by itself, as far as the choice knows."""
    monkeypatch.setattr(OpenVino, "_own_precision", lambda _: "bf16")


def test_only_an_open_option_is_raced(rounding: None) -> None:
    assert [*map(str, registry.backend("openvino{threads=2}").arithmetics)] == [
        "openvino{threads=2 precision=default}",
        "openvino{threads=2}",
    ]
    for text in ("openvino{precision=f32}", DEFAULT, "onnxruntime"):
        assert [*map(str, registry.backend(text).arithmetics)] == [text]


def test_where_the_runtime_does_not_round_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for own in ("f32", None):
        monkeypatch.setattr(OpenVino, "_own_precision", lambda _, own=own: own)
        assert registry.backend("openvino").arithmetics == (registry.backend("openvino"),)
        assert registry.backend(DEFAULT).arithmetic == "f32"


def test_files_of_others_are_opened_as_loaders_do(rounding: None, tmp_path: Path) -> None:
    for name, target in {"model.xml": DEFAULT, "model.onnx": "onnxruntime"}.items():
        (tmp_path / name).touch()
        assert target_at(tmp_path / name) == target


@pytest.mark.slow
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(("clock", "shipped"), [(all_faster, "optimized"), (all_equal, "plain")])
def test_a_plain_load_gets_what_was_checked(tiny: Path, tmp_path: Path, clock: Clock, shipped: str) -> None:
    """No properties are to be given, neither with the optimized engine nor with the plain one."""
    result = optimize(tiny, tmp_path / "out", targets=["openvino"], preset="fast", clock=clock)
    record = result.manifest.targets["openvino"]
    assert (record.target, record.arithmetic, record.shipped) == (DEFAULT, "bf16", shipped)
    assert target_at(tmp_path / "out" / "openvino") == DEFAULT
    assert record.as_loaders_open is None
    assert not (tmp_path / "out" / "openvino" / PROPERTIES).exists()
    locked = Lock.read(tmp_path / "out" / LOCK).targets["openvino"]
    assert (locked.target, locked.opened_as) == ("openvino", DEFAULT)
    assert verify(tmp_path / "out")["openvino"].problems == ()
    optimize(tiny, tmp_path / "again", targets=["openvino"], preset="fast", lock=tmp_path / "out" / LOCK)
    again = contents(tmp_path / "again" / "openvino")
    assert again == contents(tmp_path / "out" / "openvino")
    assert (tmp_path / "again" / LOCK).read_bytes() == (tmp_path / "out" / LOCK).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("rounding")
def test_exact_engines_and_given_pipelines_compute_in_float32(tiny: Path, tmp_path: Path) -> None:
    common = BuildOptions(targets=["openvino"], clock=all_equal)
    options = {"exact": replace(common, preset="exact"), "given": replace(common, pipeline="fold-constants")}
    for name, asked in options.items():
        result = optimize(tiny, tmp_path / name, asked)
        record = result.manifest.targets["openvino"]
        assert (record.target, record.arithmetic) == ("openvino", "f32")
        assert target_at(tmp_path / name / "openvino" / "openvino_model.xml") == "openvino"
        assert (tmp_path / name / "openvino" / PROPERTIES).exists()
        assert Lock.read(tmp_path / name / LOCK).targets["openvino"].opened_as is None


@pytest.mark.slow
def test_an_arithmetic_that_leaves_the_budget_is_not_taken(tiny: Path, tmp_path: Path) -> None:
    if registry.backend("openvino").arithmetics == (registry.backend("openvino"),):
        pytest.skip("OpenVINO computes in float32 by itself on this processor")
    keep = ["max_abs<=1e-4"]
    result = optimize(tiny, tmp_path / "out", targets=["openvino"], preset="fast", keep=keep, clock=all_faster)
    record = result.manifest.targets["openvino"]
    assert (record.target, record.arithmetic) == ("openvino", "f32")
    assert record.as_loaders_open is not None
    assert "max_abs" in record.as_loaders_open.violations[0]
    assert (tmp_path / "out" / "openvino" / PROPERTIES).exists()


@pytest.mark.slow
def test_an_arithmetic_that_does_not_run_is_not_taken(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere, own = OpenVino(precision="default", device="NPU"), OpenVino()
    monkeypatch.setattr(OpenVino, "arithmetics", property(lambda _: (nowhere, own)))
    told: list[str] = []
    result = optimize(
        tiny, tmp_path / "out", targets=["openvino"], preset="fast", clock=all_equal,
        progress=lambda name, *_: told.append(name),
    )  # fmt: skip
    assert result.manifest.targets["openvino"].target == "openvino"
    assert any(line.startswith("openvino{device=NPU precision=default} does not run: ") for line in told)


def test_an_engine_that_is_only_tried_need_not_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = Recipe(("quantize-int8{minimum=1 activations=runtime}",))
    also = Recipe(("quantize-int8{minimum=1 activations=tensor}",), When.ALTERNATIVE, why="it is tried")
    monkeypatch.setattr(OpenVino, "presets", {"fast": (main, also)})

    def broken(job: Job, plain: PlainEngine, target: Backend, place: Path, passes: Any) -> Verdict:
        if place.name == "openvino-1":
            raise NoAnswer(f"{place / 'model.xml'} gave no answer", where=place, advice="none")
        return judge(job, plain, target, place, passes)

    monkeypatch.setattr(candidates, "judge", broken)
    result = optimize(tiny, tmp_path / "out", targets=["openvino"], preset="fast", clock=all_faster)
    assert result.manifest.targets["openvino"].shipped == "optimized"
    (trial,) = Lock.read(tmp_path / "out" / LOCK).targets["openvino"].tried
    assert trial.why == "outside the budget: it cannot be used (openvino-1/model.xml gave no answer)"


def test_a_lock_that_opens_another_target_is_refused_before_lowering(tmp_path: Path) -> None:
    lock = tmp_path / "edited.lock"
    text = """\
source = {}
requested = {preset = "fast", budget = "cosine>=0.99"}
[targets.openvino]
target = "openvino"
opened_as = "onnxruntime"
pipelines = {}
rolled_back = []
shipped = "plain"
why = ""
machine = ""
measured = []
"""
    lock.write_text(text)
    with pytest.raises(BadInput, match="an engine for openvino cannot be opened as onnxruntime"):
        optimize(tmp_path / "nothing", tmp_path / "out", targets=["openvino"], preset="fast", lock=lock)
