"""Profiles: forms are timed once, kept, and chosen only where they are clearly faster; a lock repeats the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from planish.optimizer import Pipeline, optimize
from planish.optimizer.compilation.autotune import Tune
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.lowering import lower
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing import tuning_table as module
from planish.optimizer.timing.interleaved import Timing
from planish.optimizer.timing.tuning_table import Profile
from planish.passes.legalize.legalize_onnxruntime import LegalizeOnnxRuntime
from tests.clocks import all_faster
from tests.conftest import Planish

Race = Callable[..., list[Timing]]


def racing(speedup: float, low: float) -> tuple[Race, list[list[EngineRef]]]:
    """A race that the second engine wins by so much, and what was raced."""
    raced: list[list[EngineRef]] = []

    def race(engines: list[EngineRef], _: object, **__: object) -> list[Timing]:
        raced.append(list(engines))
        return [Timing(1, 1, 1, 1, 9), Timing(1 / speedup, speedup, low, speedup + 0.1, 9)]

    return race, raced


@pytest.fixture
def raised(tiny: Path) -> ir.Model:
    """The tiny classifier as passes leave it to legalization."""
    model, _ = lower(tiny).program.sole()
    text = str(Pipeline.preset("exact", target="onnxruntime")).partition(",legalize-onnxruntime")[0]
    return Pipeline.parse(text).run(model).model


SIZES = {"batch": 2, "sequence": 8}


def test_what_is_asked(raised: ir.Model) -> None:
    asked = {question.option: question for question in LegalizeOnnxRuntime().tuning_queries(raised, SIZES)}
    assert asked["attention"].about == "batch=2 heads=3 queries=8 keys=8 size=8 mask=bool"
    assert asked["keep_sums"].about == "batch=2 tokens=8 width=24"
    forms = []
    for value in asked["attention"].values:
        model = asked["attention"].graph()
        LegalizeOnnxRuntime(attention=value)(model)
        forms.append({node.op_type for node in model.graph})
    assert "Attention" in forms[0] and "MultiHeadAttention" in forms[1]
    assert not any("Transpose" in form for form in forms)


def test_an_answer_is_measured_once_and_kept(raised: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    race, raced = racing(1.5, 1.2)
    monkeypatch.setattr(module, "time_against_first", race)
    step = LegalizeOnnxRuntime()
    tuning_queries = [q for q in step.tuning_queries(raised, SIZES) if q.option == "attention"]
    for target in ("onnxruntime", "onnxruntime", "onnxruntime{threads=1}"):
        profile = Profile(registry.backend(target), tmp_path / "deep" / "profile.json")
        assert profile.best(step, tuning_queries) == "multi-head"
    assert [engines[0].target for engines in raced] == ["onnxruntime", "onnxruntime{threads=1}"]
    hosts = json.loads((tmp_path / "deep" / "profile.json").read_text())["hosts"]
    assert len(hosts) == 2 and all("cores" in host for host in hosts)


@pytest.mark.parametrize(("low", "wanted"), [(1.01, "multi-head"), (0.99, "standard")])
def test_only_what_is_clearly_faster_is_chosen_and_only_where_nothing_was_written(
    raised: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: float, wanted: str
) -> None:
    monkeypatch.setattr(module, "time_against_first", racing(1.5, low)[0])
    tune = Tune(Profile(registry.backend("onnxruntime"), tmp_path / "profile.json"), [SIZES])

    def chosen(text: str) -> Pass:
        return Pipeline.parse(Pipeline.parse(text).run(raised.clone(), [tune]).reports[0].text).passes[0]

    assert chosen("legalize-onnxruntime") == LegalizeOnnxRuntime(attention=wanted, keep_sums=wanted == "standard")  # type: ignore[arg-type]
    written = chosen("legalize-onnxruntime{keep_sums=false}")
    assert isinstance(written, LegalizeOnnxRuntime) and not written.keep_sums


@pytest.mark.slow
def test_another_file_is_not_taken_for_a_profile(raised: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"hosts": 3}')
    step = LegalizeOnnxRuntime()
    with pytest.raises(BadInput, match="this is not a profile"):
        Profile(registry.backend("onnxruntime"), tmp_path / "profile.json").best(
            step, step.tuning_queries(raised, SIZES)
        )


@pytest.mark.slow
def test_forms_are_really_timed(raised: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.5)
    step = LegalizeOnnxRuntime()
    profile = Profile(registry.backend("onnxruntime{threads=1}"), tmp_path / "profile.json")
    for question in step.tuning_queries(raised, SIZES):
        found = profile.latencies(step, question)
        assert set(found) == set(map(str, question.values))
        assert all(0 < one.median_ms < 1e3 and one.low <= one.speedup <= one.high for one in found.values())


@pytest.mark.slow
def test_a_lock_repeats_what_a_profile_chose(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time_against_first", racing(1.5, 1.2)[0])
    lock = tmp_path / "build.lock"
    first = optimize(tiny, tmp_path / "first", profile=tmp_path / "profile.json", lock=lock, clock=all_faster)
    assert "legalize-onnxruntime{keep_sums=false attention=multi-head}" in lock.read_text()
    assert any(first.measurements["profile"].values())
    graph = onnx.load(tmp_path / "first" / "onnxruntime" / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "MultiHeadAttention" for node in graph.node) == 2
    second = optimize(tiny, tmp_path / "second", lock=lock, profile=tmp_path / "profile.json", clock=all_faster)
    assert first.manifest.files == second.manifest.files
    assert second.notes == ["the profile was not asked about onnxruntime: the lock has decided"]
    with pytest.raises(UsageError, match="a profile chooses for presets"):
        optimize(
            tiny, tmp_path / "third", pipeline="fold-constants", profile=tmp_path / "profile.json", clock=all_faster
        )


@pytest.mark.breadth
def test_the_command_line_makes_a_profile(tiny: Path, tmp_path: Path, command: Planish) -> None:
    arguments = ["--profile", tmp_path / "p.json", "--shape", "batch=1,sequence=4"]
    done = command("optimize", tiny, "-o", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    assert "attention: batch=1 heads=3" in (tmp_path / "p.json").read_text()
