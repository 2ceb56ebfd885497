"""`quantize-cache`: what is kept of a token takes a quarter of the memory, and answers hardly change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline, optimize, verify
from planish.optimizer.errors import CheckFailed
from planish.optimizer.fidelity.inputs import make_case
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.graph import io_signature
from planish.optimizer.ir.kv_cache import CACHE_SCALE, PAST, PAST_NAME, round_cache
from planish.optimizer.ir.program import Program, Provenance, Role
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.export.onnx_file import read_signature
from planish.optimizer.pipeline.instruments import VerifyEach
from planish.optimizer.pipeline.presets import pipeline_text
from planish.optimizer.runtime.generation import Decoding
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import Timing
from tests.clocks import all_faster
from tests.train import MODELS as TRAINED
from tests.zoo import GENERATORS, Species, build

PLAIN, ROUNDED = "onnxruntime", "onnxruntime{cache=int8}"
EXACT = pipeline_text("exact", PLAIN)
BEHIND_AN_ENCODER = ("t5", "bart", "whisper")


def by_name(name: str) -> Species:
    return next(each for each in GENERATORS if each.model_type == name)


def appended(heads: int, entries: int) -> ir.Model:
    """present = (past, fresh)"""
    names = ("past_key_values.0.key", "fresh", "present.0.key")
    sizes = ("past", "sequence", "total")
    real = ir.TensorType(ir.DataType.FLOAT)
    values = [
        ir.Value(name=name, shape=ir.Shape(["batch", heads, size, entries]), type=real)
        for name, size in zip(names, sizes, strict=True)
    ]
    node = ir.Node("", "Concat", values[:2], [ir.AttrInt64("axis", 2)], outputs=values[2:])
    graph = ir.Graph(values[:2], values[2:], nodes=[node], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99)
)
def test_a_token_is_rounded_once_and_by_itself(
    rows: int, heads: int, past: int, fresh: int, entries: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-6, 6)
    old, new = (
        (scale * rng.standard_normal((rows, heads, tokens, entries))).astype(np.float32) for tokens in (past, fresh)
    )
    new[0, 0, 0] = 0  # nothing to scale
    model = appended(heads, entries)
    (report,) = Pipeline.parse("quantize-cache").run(model, [VerifyEach()]).reports
    assert report.sites == ["past_key_values.0.key", "present.0.key"]
    engine = registry.backend(PLAIN).load(model)
    assert next(tensor.dtype for tensor in engine.inputs) is ir.DataType.INT8
    found = engine.run({"past_key_values.0.key": old, "fresh": new})["present.0.key"]
    whole = np.concatenate([old, new], axis=2)
    stored, scales = round_cache(whole)
    np.testing.assert_allclose(found, stored * scales, rtol=1e-6)
    assert (np.abs(found - whole) <= np.abs(whole).max(axis=-1, keepdims=True) * 0.00394 + 1e-30).all()
    again, same = round_cache(found)
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_allclose(same, scales, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_cache_inside_attention_is_brought_out(model_type: str, tmp_path: Path) -> None:
    model, signature = lower(build(by_name(model_type), tmp_path / "checkpoint")).program.sole()
    Pipeline.preset("exact", PLAIN).run(model)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert {len(node.outputs) for node in attentions} == {3}
    rounded = model.clone()
    (report,) = Pipeline.parse("quantize-cache").run(rounded, [VerifyEach()]).reports
    assert len(report.sites) == 4 * len(attentions)
    made_real = [node.name for node in rounded.graph if (node.name or "").endswith("_real")]
    assert len(made_real) == 2 * len(attentions)  # of old and new tokens together, not of the old alone
    feeds = make_case(signature, {"batch": 3, "sequence": 2, PAST: 6}, np.random.default_rng(0))
    before, after = (registry.backend(PLAIN).load(each).run(feeds) for each in (model, rounded))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=0.02 * np.abs(array).max())


@pytest.mark.breadth
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bart", "whisper"])
def test_texts_go_on_as_before(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    species = by_name(model_type)
    checkpoint = build(species, tmp_path / "checkpoint")
    decodings = {}
    for name, target in (("plain", PLAIN), ("rounded", ROUNDED)):
        keep = ["cosine>=0.99", "kl<=0.01", "top1>=0.8"]
        result = optimize(
            checkpoint,
            tmp_path / name,
            task=species.task,
            targets=[target],
            pipeline=EXACT,
            keep=keep,
            clock=all_faster,
        )
        assert result.manifest.targets[PLAIN].shipped == "optimized"
        assert not verify(tmp_path / name)[PLAIN].problems
        backend = registry.backend(target)
        decodings[name] = Decoding.of(backend, tmp_path / name / PLAIN, result.manifest.signatures)
    signatures = {name: each.signature() for name, each in result.manifest.signatures.items()}
    rng = np.random.default_rng(0)
    prompt: dict[str, np.ndarray] = {"input_ids": rng.integers(5, 40, (3, 9))}
    if model_type == "whisper":
        heard = signatures["encoder_model"].inputs
        prompt = {t.name: rng.standard_normal((3, *map(int, t.shape[1:]))).astype(np.float32) for t in heard}
    start = np.full((3, 1), 2) if model_type in BEHIND_AN_ENCODER else None
    scores = {name: [decoding.start(prompt, start)] for name, decoding in decodings.items()}
    rows = np.array([2, 0, 0])
    for step in range(8):
        tokens = scores["plain"][-1].argmax(-1)
        for name, decoding in decodings.items():
            if step == 4:
                decoding.select(rows)
            scores[name].append(decoding.advance(tokens[rows] if step == 4 else tokens))
    for one, other in zip(scores["plain"], scores["rounded"], strict=True):
        assert np.square(one - other).mean() < 0.05 * one.var(axis=-1).mean()  # of random weights
    assert not np.array_equal(scores["plain"][-1], scores["rounded"][-1])  # it is rounded indeed
    decoder = signatures["decoder_with_past_model" if start is not None else "model"]
    entries = next(int(tensor.shape[3]) for tensor in decoder.inputs if tensor.role is Role.CACHE)
    sizes = {name: size_of(decoding._cache) for name, decoding in decodings.items()}
    assert sizes["rounded"] == pytest.approx((entries + 4) / (4 * entries) * sizes["plain"])


def size_of(cache: Any) -> int:
    return sum(value.numpy().nbytes for value in cache.values())


@pytest.mark.slow
def test_a_trained_model_hardly_notices(tmp_path: Path) -> None:
    keep = ["perplexity<=1.001x", "kl<=1e-3"]
    optimize(TRAINED / "writer", tmp_path / "out", targets=[ROUNDED], pipeline=EXACT, keep=keep, clock=all_faster)
    assert not verify(tmp_path / "out")[PLAIN].problems
    model = ir.load(tmp_path / "out" / PLAIN / "model.onnx")  # whether it is the plain one or not
    caches = [value for value in model.graph.inputs if (value.name or "").startswith(PAST_NAME)]
    assert {value.dtype for value in caches if not (value.name or "").endswith(CACHE_SCALE)} == {ir.DataType.INT8}


@pytest.mark.breadth
@pytest.mark.parametrize("speed", [2.0, 0.5])
def test_components_that_hand_each_other_something_else_go_together(
    speed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is so much faster; by themselves the others would win in the slow case, and lose in the fast one."""

    def race(engines: Sequence[EngineRef], _: Any) -> list[Timing]:
        own = speed if "with_past" in str(engines[0].path) else 1.3 if speed < 1 else 0.9
        return [Timing(1, own, 0.99 * own, 1.01 * own, 1)] * len(engines)

    text = EXACT.replace("legalize-onnxruntime", "quantize-cache,legalize-onnxruntime")
    lowered = lower(build(by_name("t5"), tmp_path / "checkpoint"))
    optimize(tmp_path / "checkpoint", tmp_path / "out", pipeline=text, keep=["cosine>=0.99"], clock=race)
    changed = {
        name: io_signature(ir.load(tmp_path / "out" / PLAIN / f"{name}.onnx")) != io_signature(model)
        for name, model in lowered.program.components.items()
        if name != "encoder_model"
    }
    assert set(changed.values()) == {speed > 1}


@pytest.mark.breadth
def test_a_file_whose_cache_is_in_8_bits_already_is_called_in_float(tmp_path: Path) -> None:
    optimize(
        build(by_name("llama"), tmp_path / "checkpoint"),
        tmp_path / "out",
        targets=[ROUNDED],
        pipeline="",
        keep=["cosine>=0.99"],
    )
    file = tmp_path / "out" / PLAIN / "model.onnx"
    caches = [tensor for tensor in read_signature(file).inputs if tensor.role is Role.CACHE]
    assert len(caches) == 4
    assert {tensor.dtype for tensor in caches} == {ir.DataType.FLOAT}
    result = optimize(file, tmp_path / "again", preset="exact")
    assert result.manifest.targets[PLAIN].rolled_back == []


def test_a_cache_that_cannot_be_kept_so_is_said_aloud(tmp_path: Path) -> None:
    model = appended(2, 4)
    model.opset_imports[""] = 17  # whose ReduceMax takes no axes
    backend = registry.backend(ROUNDED)
    with pytest.raises(
        CheckFailed, match=r"past_key_values.0.key cannot be kept in 8 bits: the model is written in opset"
    ):
        backend.emit(Program({"model": model}, {}, "", Provenance("onnx", "g")), tmp_path)
    assert not list(tmp_path.iterdir())
    again = appended(2, 4)
    Pipeline.parse("quantize-cache").run(again)
    (report,) = Pipeline.parse("quantize-cache").run(again).reports
    assert not report.sites
    assert not report.refusals
