"""The whole way, on a tiny checkpoint: output, lock, equal bytes, interruption, full disk."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer import errors, optimize
from planish.optimizer.driver.verify import verify
from planish.optimizer.interfaces.pass_base import PassResult
from planish.optimizer.interfaces.recipe import Recipe, When
from planish.optimizer.ir.program import Arrays
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.pipeline import presets
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.system.staging import MEASURED, MEASUREMENTS
from planish.optimizer.timing.interleaved import Timing
from planish.passes.fusion.fuse_attention import FuseAttention
from tests.clocks import all_equal, all_faster
from tests.conftest import Planish
from tests.optimizer.driver.conftest import SHAPE, digests
from tests.zoo import GENERATORS, build

pytestmark = pytest.mark.slow


def test_the_output_holds_what_loaders_expect(built: Path) -> None:
    out = built / "out"
    names = set(digests(out))
    common = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {"planish.json", "planish.lock", "report.html", "reference/inputs.safetensors"} <= names
    assert {f"onnxruntime/{name}" for name in common | {"model.onnx"}} <= names
    assert {f"openvino/{name}" for name in common | {"openvino_model.xml", "openvino_model.bin"}} <= names
    # They say which arithmetic to take, where that is not what a loader takes by itself.
    chosen = Manifest.read(out).targets["openvino"].target
    assert ("openvino/openvino_properties.json" in names) == ("precision=default" not in chosen)
    for path in out.rglob("*"):
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
        assert path.is_dir() or path.stat().st_nlink == 1
    assert [path.name for path in built.iterdir() if path.name.startswith(".")] == []


def test_nothing_of_the_building_machine_is_in_the_files(built: Path, tiny: Path) -> None:
    secrets = [str(tiny), str(built), str(Path.home()), time.strftime("%Y-%m-%d")]
    for path in (path for path in (built / "out").rglob("*") if path.is_file() and path.name not in MEASURED):
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_manifest_hashes_and_reference_agree_with_the_files(built: Path) -> None:
    out = built / "out"
    manifest = Manifest.read(out)
    assert manifest.files == {k: v for k, v in digests(out).items() if k != "planish.json"}
    assert manifest.source.architecture == "BertForSequenceClassification"
    assert manifest.task == "text-classification"
    for verdict in verify(out).values():
        assert verdict.problems == ()
    measured = json.loads((out / MEASUREMENTS).read_text())
    assert set(measured["targets"]) == {"onnxruntime", "openvino"}


def test_the_depfile_names_what_was_read(built: Path, tiny: Path) -> None:
    target, _, inputs = (built / "out.d").read_text().partition(": ")
    assert target == str(built / "out" / "planish.json")
    assert {str(tiny / "config.json"), str(tiny / "model.safetensors")} <= set(inputs.split())


def test_a_locked_build_gives_the_same_bytes_elsewhere(
    built: Path, tiny: Path, tmp_path: Path, planish: Planish
) -> None:
    """Another folder, another working folder, another hash seed, another zone and language; nothing is measured."""
    moved = shutil.copytree(tiny, tmp_path / "moved" / "checkpoint")
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Pacific/Auckland", "LC_ALL": "C", "COLUMNS": "40"}
    done = planish(
        *("optimize", moved, "-o", tmp_path / "again", "--target", "onnxruntime", "--target", "openvino"),
        *("--preset", "fast", "--lock", built / "tiny.lock", *SHAPE),
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "again") == digests(built / "out")
    assert "measurement" not in done.stderr
    latencies = json.loads((tmp_path / "again" / MEASUREMENTS).read_text())["targets"]["openvino"]["latency_ms"]
    assert latencies == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--preset", "exact"], "this lock was made for"),
        (["--keep", "cosine>=0.5"], "this lock was made for"),
        (["--target", "openvino"], "this lock was made for the targets"),
    ],
)
def test_a_lock_fits_one_request_only(
    change: list[str], message: str, built: Path, tiny: Path, tmp_path: Path, command: Planish
) -> None:
    targets = [] if "--target" in change else ["--target", "onnxruntime", "--target", "openvino"]
    preset = [] if "--preset" in change else ["--preset", "fast"]
    lock = ["--lock", built / "tiny.lock"]
    done = command("optimize", tiny, "-o", tmp_path / "out", *targets, *preset, *change, *lock)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_notices_a_changed_file(built: Path, tmp_path: Path, planish: Planish, command: Planish) -> None:
    out = shutil.copytree(built / "out", tmp_path / "out")
    assert planish("verify", out).returncode == 0
    model = out / "onnxruntime" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    done = command("verify", out)
    assert done.returncode == 1
    assert "onnxruntime: onnxruntime/model.onnx is not the file that was written" in done.stderr
    assert "openvino" in done.stdout


def test_verify_notices_other_outputs(built: Path, tmp_path: Path) -> None:
    """Outputs of the reference that the engines do not give: as on a machine whose kernels are wrong."""
    from planish.optimizer.output.manifest import digest_of
    from planish.optimizer.runtime.cases import load_cases, save_cases

    out = shutil.copytree(built / "out", tmp_path / "out")
    path = out / "reference" / "outputs.safetensors"
    save_cases([{name: -array for name, array in case.items()} for case in load_cases(path)], path)
    manifest = Manifest.read(out)
    files = {**manifest.files, "reference/outputs.safetensors": digest_of(path) or ""}
    manifest.model_copy(update={"files": files}).write(out)
    for verdict in verify(out).values():
        assert "of logits is" in verdict.problems[0]


def test_engines_answer_from_python(tiny: Path, tmp_path: Path) -> None:
    result = optimize(
        tiny,
        tmp_path / "python",
        targets=["onnxruntime{threads=1}"],
        shapes=[{"batch": 1, "sequence": 8}],
        clock=all_equal,
    )
    engine = result.engines["onnxruntime"]
    ids = np.array([[2, 7, 8, 3]], np.int32)
    whole = engine.run({"input_ids": ids, "attention_mask": np.ones((1, 4), np.int64)})
    assert whole["logits"].shape == (1, 3)
    np.testing.assert_array_equal(engine.run({"input_ids": ids})["logits"], whole["logits"])
    with pytest.raises(errors.BadInput, match="has no input 'inputs_ids'"):
        engine.run({"inputs_ids": ids})
    with pytest.raises(errors.BadInput, match="input 'input_ids' is missing"):
        engine.run({})
    with pytest.raises(errors.BadInput, match="is float64, the engine takes int64"):
        engine.run({"input_ids": ids.astype(np.float64)})
    with pytest.raises(errors.BadInput, match="ONNX Runtime cannot run these inputs"):
        engine.run({"input_ids": np.zeros((1, 99), np.int64)})


@pytest.mark.parametrize(
    ("low", "shipped", "why"),
    [
        (1.01, "optimized", "faster than the plain lowering"),
        (0.99, "plain", "not measurably faster than the plain lowering"),
    ],
)
def test_only_what_is_faster_is_shipped(
    low: float, shipped: str, why: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = [Timing(2.0, 1.0, 1.0, 1.0, 20), Timing(1.9, 1.05, low, 1.1, 20)]
    result = optimize(tiny, tmp_path / "out", preset="exact", clock=lambda engines, inputs: timings)
    record = result.manifest.targets["onnxruntime"]
    assert (record.shipped, record.why) == (shipped, why)
    assert bool(record.pipelines) == (shipped == "optimized")
    domains = [node.op_type for node in onnx.load(tmp_path / "out" / "onnxruntime" / "model.onnx").graph.node]
    assert ("Sum" in domains) == (shipped == "optimized")  # the mark of legalize-onnxruntime
    assert f'shipped = "{shipped}"' in (tmp_path / "out" / "planish.lock").read_text()


@pytest.mark.parametrize(("low", "kept"), [(1.5, True), pytest.param(1.05, False, marks=pytest.mark.breadth)])
def test_padding_is_removed_where_that_is_faster(
    low: float, kept: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = [Timing(2.0, 1.0, 1.0, 1.0, 20), Timing(1.8, 1.1, 1.08, 1.2, 20), Timing(1.2, 1.6, low, 1.7, 20)]
    build = functools.partial(
        optimize,
        tiny,
        preset="exact",
        shapes=[{"batch": 4, "sequence": 8}],
        lock=tmp_path / "lock",
        clock=lambda engines, inputs: timings[: len(engines)],
    )
    result = build(tmp_path / "out")
    record = result.manifest.targets["onnxruntime"]
    assert ("remove-padding" in record.pipelines["model"]) == kept
    (trial,) = Lock.read(tmp_path / "lock").targets["onnxruntime"].tried
    assert (trial.passes, trial.kept, trial.measured[0].low) == ("remove-padding", kept, low)
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "onnxruntime" / "model.onnx").graph.node]
    assert ("CumSum" in operators) == kept
    build(tmp_path / "again")
    built = [(tmp_path / name / "onnxruntime" / "model.onnx").read_bytes() for name in ("out", "again")]
    assert built[0] == built[1]
    assert trial.why == ("faster than without" if kept else "not measurably faster than without")
    single = optimize(
        tiny,
        tmp_path / "single",
        preset="exact",
        shapes=[{"batch": 1, "sequence": 8}],
        clock=lambda engines, inputs: timings[: len(engines)],
    )
    assert not Lock.read(single.folder / "planish.lock").targets["onnxruntime"].tried


def test_each_component_is_chosen_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def race(engines: list[EngineRef], inputs: list[Arrays]) -> list[Timing]:
        own = Timing(2.0, 1.25, 1.2, 1.3, 20) if "encoder" in engines[0].path.name else Timing(2.0, 1.0, 0.98, 1.02, 20)
        return [Timing(2.0, 1.0, 1.0, 1.0, 20), *[own] * (len(engines) - 1)]

    checkpoint = build(next(each for each in GENERATORS if each.model_type == "t5"), tmp_path / "checkpoint")
    lock = tmp_path / "lock"
    record = optimize(checkpoint, tmp_path / "out", preset="exact", lock=lock, clock=race).manifest.targets[
        "onnxruntime"
    ]
    assert record.why == "faster than the plain lowering; left plain: decoder_model, decoder_with_past_model"
    assert [name for name, text in record.pipelines.items() if text] == ["encoder_model"]
    again = optimize(checkpoint, tmp_path / "again", preset="exact", lock=lock, clock=race).manifest.targets[
        "onnxruntime"
    ]
    assert again.pipelines == record.pipelines
    for name in ("encoder_model", "decoder_model", "decoder_with_past_model"):
        made = [(tmp_path / folder / "onnxruntime" / f"{name}.onnx").read_bytes() for folder in ("out", "again")]
        assert made[0] == made[1]


def test_a_trial_that_changes_nothing_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "SHARED", (Recipe(("fuse-rms-norm",), When.PADDED),))
    result = optimize(tiny, tmp_path / "out", preset="exact", shapes=[{"batch": 4, "sequence": 8}], clock=all_equal)
    (trial,) = Lock.read(result.folder / "planish.lock").targets["onnxruntime"].tried
    assert (trial.kept, trial.why, trial.measured) == (False, "changed nothing: no place for it", [])


def test_a_pass_that_misses_what_was_asked_for_is_undone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = Recipe(("fold-constants", "prune-ffn{keep=0.5 multiple=4}"))
    monkeypatch.setattr(OnnxRuntime, "presets", {"fast": (pruning,)})
    result = optimize(
        tiny, tmp_path / "out", preset="fast", keep=["max_abs<=1e-5"], shapes=[{"sequence": 8}], clock=all_equal
    )
    record = result.manifest.targets["onnxruntime"]
    (undone,) = record.rolled_back
    assert undone.text == "prune-ffn{keep=0.5 multiple=4}"
    assert "max_abs of logits is" in undone.reason
    assert [step.text for step in record.passes] == ["fold-constants"]
    assert result.notes == []  # it did what it is made for: no bug, no reproducer
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pruning_shrinks_and_says_what_it_costs(tiny: Path, tmp_path: Path) -> None:
    plain = optimize(
        tiny, tmp_path / "plain", pipeline="fold-constants", shapes=[{"batch": 1, "sequence": 8}], clock=all_equal
    )
    pruned = optimize(
        tiny,
        tmp_path / "pruned",
        pipeline="prune-ffn{keep=0.5 multiple=4}",
        shapes=[{"batch": 1, "sequence": 8}],
        clock=all_equal,
    )
    (step,) = pruned.manifest.targets["onnxruntime"].passes
    assert step.sites == 2
    assert step.weight_bytes[1] < step.weight_bytes[0]
    assert step.difference is not None
    assert step.difference["logits"]["max_abs"] > 0
    assert plain.manifest.reference.noise == pruned.manifest.reference.noise


def test_what_was_not_checked_says_so_everywhere(tiny: Path, tmp_path: Path, command: Planish) -> None:
    done = command("optimize", tiny, "-o", tmp_path / "out", "--reference", "none", "--pipeline", "fold-constants")
    assert done.returncode == 0, done.stderr
    assert "NOT CHECKED" in done.stdout
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.reference.origin == "NOT CHECKED"
    (record,) = manifest.targets.values()
    assert "NOT CHECKED" in record.why
    assert record.checked_with == "NOT CHECKED"
    assert record.comparison == {}
    assert "NOT CHECKED" in (tmp_path / "out" / "report.html").read_text()


def test_what_all_pipelines_begin_with_is_run_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    call = FuseAttention.call

    def counted(step: FuseAttention, model: ir.Model) -> PassResult:
        runs.append(step.name)
        return call(step, model)

    monkeypatch.setattr(FuseAttention, "call", counted)
    optimize(tiny, tmp_path / "out", targets=["onnxruntime", "openvino"], shapes=[{"sequence": 8}], clock=all_faster)
    assert runs == ["fuse-attention"]
    choices = Lock.read(tmp_path / "out" / LOCK).targets
    assert all("fuse-attention" in choice.pipelines["model"] for choice in choices.values())
    assert len(choices) == 2
