"""OpenVINO: what is written, how it runs, and that it tells nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.backends.openvino.engine import InferRequest, RequestPool
from planish.backends.openvino.target import PROPERTIES, OpenVino
from planish.optimizer import Pipeline, optimize, verify
from planish.optimizer.cli.display import print_result
from planish.optimizer.errors import BadInput, CheckFailed, InternalError, MissingRuntime, PlanishError, UsageError
from planish.optimizer.fidelity.engine_check import check_as_loaders_open
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.fidelity.reference import References
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.counters import Probe, product
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Program, Provenance, Signature
from planish.optimizer.lowering import lower
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.system.machine import instruction_set
from tests.backends.conftest import contents
from tests.backends.test_onnxruntime import FEEDS
from tests.backends.test_tensorrt import generator
from tests.clocks import all_equal
from tests.conftest import Planish
from tests.zoo import Species, build


@pytest.fixture
def folder(program: Program, tmp_path: Path) -> Path:
    registry.backend("openvino").emit(program, tmp_path)
    return tmp_path


def test_names_are_those_that_loaders_expect(folder: Path) -> None:
    assert set(contents(folder)) == {"openvino_model.xml", "openvino_model.bin", PROPERTIES, "README.md"}
    engine = registry.backend("openvino").open(folder)
    assert {tensor.name for tensor in engine.inputs} == set(FEEDS)
    assert [tensor.name for tensor in engine.outputs] == ["last_hidden_state"]


def test_it_computes_what_onnxruntime_computes(program: Program, folder: Path) -> None:
    (folder / "ort").mkdir()
    registry.backend("onnxruntime").emit(program, folder / "ort")
    wanted = registry.backend("onnxruntime").open(folder / "ort").run(FEEDS)
    found = registry.backend("openvino{threads=1}").open(folder).run(FEEDS)
    name = "last_hidden_state"
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_weights_stay_in_full_precision_and_so_does_arithmetic(folder: Path) -> None:
    engine = registry.backend("openvino").open(folder)
    compiled = engine._pool.compiled  # type: ignore[attr-defined]
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert b'element_type="f16"' not in (folder / "openvino_model.xml").read_bytes()


def test_the_properties_beside_the_engine_give_what_was_checked(folder: Path) -> None:
    import openvino as ov

    properties = json.loads((folder / PROPERTIES).read_text())
    compiled = ov.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", properties)
    (plainly,) = compiled(FEEDS).to_dict().values()
    (wanted,) = registry.backend("openvino").open(folder).run(FEEDS).values()
    np.testing.assert_array_equal(plainly, wanted)
    assert json.dumps(properties) in (folder / "README.md").read_text()


def test_nothing_is_to_be_given_where_the_default_was_checked(program: Program, tmp_path: Path) -> None:
    registry.backend("openvino{precision=default}").emit(program, tmp_path)
    assert set(contents(tmp_path)) == {"openvino_model.xml", "openvino_model.bin"}


def test_loaders_open_it_in_the_precision_of_the_runtime() -> None:
    import openvino as ov

    preferred = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    for precision in ("f32", "bf16"):
        opened = registry.backend(f"openvino{{precision={precision} threads=1}}").as_loaders_open()
        assert (opened is None) == (precision == preferred)
        assert opened is None or str(opened) == "openvino{precision=default}"
    assert registry.backend("openvino{precision=default}").as_loaders_open() is None


@pytest.mark.slow
def test_table_and_manifest_say_what_a_plain_load_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino as ov

    default = registry.backend("openvino{precision=default}")
    monkeypatch.setattr(OpenVino, "as_loaders_open", lambda _: default)  # on machines without bf16 as well
    checkpoint = build(Species("bert", "feature-extraction"), tmp_path / "checkpoint")
    result = optimize(
        checkpoint, tmp_path / "out", targets=["openvino"], pipeline="remove-unused-nodes", clock=all_equal
    )
    record = result.manifest.targets["openvino"].as_loaders_open
    assert record is not None
    assert record.target == "openvino{precision=default}"
    references = References.load(tmp_path / "out" / "reference", {"model": {}}, "")
    compiled = ov.Core().compile_model(str(tmp_path / "out" / "openvino" / "openvino_model.xml"), "CPU")
    pairs = zip(references.components["model"].inputs, references.components["model"].outputs, strict=True)
    worst = max(float(np.abs(compiled(dict(i))["last_hidden_state"] - o["last_hidden_state"]).max()) for i, o in pairs)
    assert record.comparison["last_hidden_state"]["max_abs"] == pytest.approx(worst, rel=0.2)
    rounds = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name() != "f32"
    assert bool(record.violations) == rounds
    print_result(result.manifest, {"openvino": Lock.read(tmp_path / "out" / LOCK).targets["openvino"]}, {})
    said = capsys.readouterr().out
    assert "loaded without options, which is openvino{precision=default}" in said
    assert ("OUTSIDE the budget" in said) == rounds
    verdict = verify(tmp_path / "out")["openvino"]
    assert not verdict.problems
    assert "loaded without options (openvino{precision=default}): " in verdict.note
    assert ("within the budget" in verdict.note) != rounds


@pytest.mark.slow
def test_a_plain_load_that_fails_is_told_and_fails_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Planish, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino

    refused = OpenVino(precision="default", device="NPU")
    if "NPU" in openvino.Core().available_devices:
        pytest.skip("this machine opens it")
    monkeypatch.setattr(OpenVino, "as_loaders_open", lambda _: refused)
    checkpoint = build(Species("bert", "feature-extraction"), tmp_path / "checkpoint")
    result = optimize(
        checkpoint, tmp_path / "out", targets=["openvino"], pipeline="remove-unused-nodes", clock=all_equal
    )
    record = result.manifest.targets["openvino"].as_loaders_open
    assert record is not None
    assert record.comparison == {}
    assert record.violations[0].startswith("it cannot be used (")
    assert str(tmp_path) not in record.violations[0]
    assert Manifest.read(tmp_path / "out") == result.manifest
    capsys.readouterr()
    print_result(result.manifest, {"openvino": Lock.read(tmp_path / "out" / LOCK).targets["openvino"]}, {})
    assert f"loaded without options, which is {refused}: FAILS: it cannot be used (" in capsys.readouterr().out
    done = command("verify", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"loaded without options ({refused}): it cannot be used (" in done.stdout


@pytest.mark.parametrize("error", [BadInput, CheckFailed, InternalError, MissingRuntime])
def test_a_plain_load_that_breaks_names_no_place(
    error: type[PlanishError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error(f"OpenVINO refuses the model: cannot read\n {tmp_path}/openvino_model.bin", where=tmp_path)

    monkeypatch.setattr("planish.optimizer.fidelity.engine_check.check_engines", broken)
    fidelity = check_as_loaders_open(OpenVino(), tmp_path, {}, References({}))
    file = f"{tmp_path.name}/openvino_model.bin"
    assert fidelity.violations(Parts({})) == [f"it cannot be used (OpenVINO refuses the model: cannot read {file})"]
    assert fidelity.comparison().outputs == {}


def test_threads_reach_the_runtime(folder: Path) -> None:
    engine = registry.backend("openvino{threads=1}").open(folder)
    compiled = engine._pool.compiled  # type: ignore[attr-defined]
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.slow
def test_the_package_that_reports_usage_is_never_loaded(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from planish.optimizer.interfaces import registry; "
        f"registry.backend('openvino').open(Path({str(folder)!r})); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_bucket_serves_its_size_and_no_other(folder: Path) -> None:
    plain, engine = (
        registry.backend("openvino").open(folder),
        registry.backend("openvino{buckets=[1x3,2x5]}").open(folder),
    )
    used: list[str] = []
    for size, pool in engine._buckets.items():  # type: ignore[attr-defined]
        engine._buckets[size] = Watched(pool, str(size), used)  # type: ignore[attr-defined]
    for texts, tokens in ((1, 3), (2, 5), (1, 4)):
        feeds = {name: np.ones((texts, tokens), np.int64) for name in FEEDS}
        for name, wanted in plain.run(feeds).items():
            np.testing.assert_allclose(engine.run(feeds)[name], wanted, rtol=1e-4, atol=1e-5)
    assert used == ["(1, 3)", "(2, 5)"]


class Watched:
    """A pool that says when it is used."""

    def __init__(self, pool: RequestPool, name: str, used: list[str]) -> None:
        self.pool, self.name, self.used = pool, name, used

    def take(self) -> InferRequest:
        self.used.append(self.name)
        return self.pool.take()


def test_buckets_that_make_no_sense(folder: Path) -> None:
    for sizes in ("16", "1x9999999", "0x4", ",".join(["1x16"] * 65)):
        with pytest.raises(UsageError, match="option buckets"):
            registry.backend(f"openvino{{buckets=[{sizes}]}}")


@pytest.mark.slow
def test_a_model_that_keeps_a_cache_has_no_buckets(tmp_path: Path) -> None:
    registry.backend("openvino").emit(generator("gpt2", tmp_path), tmp_path)
    with pytest.raises(BadInput, match=r"has other axes than texts and tokens.*leave out the option buckets"):
        registry.backend("openvino{buckets=[1x3]}").open(tmp_path)


@pytest.mark.slow
def test_a_cache_of_grouped_heads_is_kept_by_one_kernel_and_nothing_is_guarded(tmp_path: Path) -> None:
    program = generator("llama", tmp_path)
    model, _ = program.sole()
    Pipeline.preset("exact", "openvino").run(model)
    registry.backend("openvino").emit(program, tmp_path)
    text = (tmp_path / "openvino_model.xml").read_text()
    assert "ScaledDotProductAttention" in text
    assert "IsNaN" not in text
    engine: Any = registry.backend("openvino").open(tmp_path)
    kinds = [
        node.get_rt_info()["layerType"].astype(str) for node in engine._pool.compiled.get_runtime_model().get_ops()
    ]
    assert kinds.count("ScaledDotProductAttention") == 2
    assert "Softmax" not in kinds  # which stands where the kernel was not made


@pytest.mark.slow
def test_a_plain_load_computes_attention_to_inputs_with_the_lengths_of_each_call(tmp_path: Path) -> None:
    """Attention of a T5 decoder to its encoder and to itself have different operands, and here equal lengths."""
    program = lower(Path(__file__).parents[1] / "data" / "models" / "translator").program
    name = "decoder_with_past_model"
    signature = program.signatures[name]
    registry.backend("openvino").emit(program, tmp_path)
    file = tmp_path / f"openvino_{name}.xml"
    plain = registry.backend("openvino{precision=default}").open(file)
    exact = registry.backend("openvino").open(file)
    random = np.random.default_rng(0)
    for batch, tokens, past, encoded in [(1, 1, 3, 9), (2, 9, 5, 11), (1, 1, 15, 16), (1, 1, 8, 9), (3, 9, 0, 9)]:
        sizes = {"batch": batch, "sequence": tokens, PAST: past, "encoder_sequence": encoded}
        shapes = {tensor.name: signature.shape_of(tensor, sizes) for tensor in signature.inputs}
        feeds: dict[str, Any] = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        feeds["input_ids"] = random.integers(4, 30, (batch, tokens))
        feeds["encoder_attention_mask"] = np.ones((batch, encoded), np.int64)
        expected, actual = exact.run(feeds)["logits"], plain.run(feeds)["logits"]
        np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max(), rtol=0)


def test_files_say_how_many_entries_of_an_activation_share_a_step(tmp_path: Path) -> None:
    """Loaders without options take it from the file; coarser steps give other outputs."""
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    outputs = {}
    for name, last in {"plain": "", "grouped": ",group-activations{size=64}"}.items():
        model = product(4, 64, Probe("f32", "openvino"))
        Pipeline.parse(f"quantize-int8{{minimum=1 activations=runtime}}{last}").run(model)
        place = tmp_path / name
        place.mkdir()
        border = {"model": Signature((), ())}
        registry.backend("openvino").emit(Program({"model": model}, border, "", Provenance("onnx", "test")), place)
        outputs[name] = registry.backend("openvino").open(place).run({"x": x})["y"]
        said = '<DYNAMIC_QUANTIZATION_GROUP_SIZE value="64"' in (place / "openvino_model.xml").read_text()
        assert said == (name == "grouped")
    if "vnni" in instruction_set():
        assert not np.array_equal(outputs["plain"], outputs["grouped"])
