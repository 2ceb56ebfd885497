"""Decoders and encoder-decoders: graphs, caches that are broken on purpose, the decode loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from planish.optimizer import bench, optimize, verify
from planish.optimizer.compilation.references import ask_references, reference_inputs
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.engine_check import check_engines
from planish.optimizer.fidelity.inputs import default_shapes
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.fidelity.reference import References
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import SUM, Role, Signature
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.lowering.export.onnx_file import read_signature
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.runtime.generation import Decoding, Sampling
from planish.optimizer.system.staging import MEASURED
from planish.optimizer.timing.interleaved import Timing
from tests.clocks import all_equal, all_faster
from tests.train import MODELS as TRAINED
from tests.zoo import GENERATORS, Species, build

TARGETS = ("onnxruntime", "openvino")


def by_name(name: str) -> Species:
    return next(species for species in GENERATORS if species.model_type == name)


def lowered_with_references(species: Species, folder: Path) -> tuple[Lowered, References]:
    lowered = lower(build(species, folder / "checkpoint"))
    return lowered, ask_references(lowered, reference_inputs(lowered, None))()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lowered, References]:
    return lowered_with_references(by_name("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lowered, References]:
    return lowered_with_references(by_name("t5"), tmp_path_factory.mktemp("t5"))


@pytest.mark.slow
def test_one_graph_serves_prefill_and_decode(llama: tuple[Lowered, References]) -> None:
    signature = llama[0].program.sole()[1]
    shapes = {tensor.name: tensor.shape for tensor in (*signature.inputs, *signature.outputs)}
    assert shapes["input_ids"] == ("batch", "sequence")
    assert shapes["attention_mask"] == ("batch", SUM.join(["past", "sequence"]))
    assert shapes["past_key_values.1.value"] == ("batch", 2, "past", 8)
    assert shapes["present.1.value"] == ("batch", 2, "past + sequence", 8)
    assert (signature.axes["past"].minimum, signature.axes["past"].maximum) == (0, 47)
    pasts = {case["past_key_values.0.key"].shape[2] for case in llama[1].components["model"].inputs}
    assert {0, 1, 47} <= pasts


@pytest.mark.slow
def test_a_decoder_may_score_the_last_token_alone(tmp_path: Path) -> None:
    checkpoint = build(by_name("llama"), tmp_path / "checkpoint")
    result = optimize(checkpoint, tmp_path / "out", targets=TARGETS, logits="last", clock=all_faster)
    signature = result.manifest.signatures["model"].signature()
    assert next(tensor.shape[1] for tensor in signature.outputs if tensor.name == "logits") == 1
    whole = lower(checkpoint)
    case = reference_inputs(whole, None)["model"][1]
    scores = whole.original.answer({"model": [case]}, 0).outputs["model"][0]["logits"]
    assert scores.shape[1] > 1
    for target in TARGETS:
        backend = registry.backend(target)
        engine = backend.open(backend.path_of("model", tmp_path / "out" / target))
        np.testing.assert_allclose(engine.run(case)["logits"], scores[:, -1:], rtol=1e-3, atol=1e-4)
    assert not any(verdict.problems for verdict in verify(tmp_path / "out").values())
    file = read_signature(tmp_path / "out" / "onnxruntime" / "model.onnx")  # its cache inputs leave heads open
    assert [tensor.shape[1::2] for tensor in file.inputs if tensor.role is Role.CACHE] == [(2, 8)] * 4


@pytest.mark.breadth
def test_weights_in_few_bits_race_where_texts_are_written(tmp_path: Path) -> None:
    result = optimize(TRAINED / "writer", tmp_path / "out", preset="fast", shapes=[{"sequence": 1, "past": 32}])
    tried = Lock.read(result.folder / LOCK).targets["onnxruntime"].tried
    (trial,) = (trial for trial in tried if trial.raced)  # static int8 is listed too: it needs calibration data
    assert "quantize-weights{bits=4 block=128}" in trial.passes
    assert trial.measured
    shipped = Lock.read(result.folder / LOCK).targets["onnxruntime"].pipelines["model"]
    assert ("quantize-weights{bits=4" in shipped) == trial.kept


def test_scores_of_the_last_token_alone_are_for_decoders(tmp_path: Path) -> None:
    encoder_decoder = build(by_name("t5"), tmp_path / "t5")
    with pytest.raises(UsageError, match="no scores behind a last token"):
        optimize(encoder_decoder, tmp_path / "out", logits="last")
    with pytest.raises(UsageError, match="only a checkpoint folder"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", logits="last")
    with pytest.raises(UsageError, match="perplexity needs the scores behind every token"):
        optimize(encoder_decoder, tmp_path / "out", preset="small", keep=["perplexity<=1.02x"], logits="last")


Break = Callable[[dict[str, ir.Model]], None]


def mask_off_by_one(models: dict[str, ir.Model]) -> None:
    """A token no longer sees itself."""
    (node,) = [node for node in models["model"].graph if node.op_type == "LessOrEqual"]
    node.op_type = "Less"


def positions_not_shifted(models: dict[str, ir.Model]) -> None:
    """Every call counts from its own first token."""
    graph = models["model"].graph
    (positions,) = [value for value in graph.inputs if value.name == "position_ids"]
    zero, axes = ir.tensor(np.array([0], np.int64)), ir.tensor(np.array([1], np.int64))
    constants = [ir.node("Constant", [], {"value": tensor}) for tensor in (zero, axes)]
    first = ir.node("Gather", [positions, constants[0].outputs[0]], {"axis": 1})
    shifted = ir.node("Sub", [positions, first.outputs[0]])
    ir.convenience.replace_all_uses_with(positions, shifted.outputs[0])
    graph.insert_before(graph[0], [*constants, first, shifted])
    for node in (first, shifted):
        node.replace_input_with(0, positions)


def cache_transposed(models: dict[str, ir.Model]) -> None:
    """Keys are given as values."""
    outputs = models["model"].graph.outputs
    one, other = (next(v for v in outputs if v.name == f"present.0.{kind}") for kind in ("key", "value"))
    one.name, other.name = "swapped", one.name
    one.name = "present.0.value"


def cross_attention_stale(models: dict[str, ir.Model]) -> None:
    """The second layer reads the first one's keys of the encoder."""
    outputs = models["decoder_model"].graph.outputs
    one, other = (next(v for v in outputs if v.name == f"present.{layer}.encoder.key") for layer in (0, 1))
    one.name, other.name = "swapped", one.name
    one.name = "present.1.encoder.key"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [mask_off_by_one, positions_not_shifted, cache_transposed, cross_attention_stale])
def test_a_broken_cache_is_noticed(
    broken: Break, llama: tuple[Lowered, References], t5: tuple[Lowered, References], tmp_path: Path
) -> None:
    lowered, references = t5 if broken is cross_attention_stale else llama
    models = {name: model.clone() for name, model in lowered.program.components.items()}
    target = registry.backend("onnxruntime")
    exact = {name: own.exact_budget() for name, own in references.components.items()}
    budgets = Parts(exact, continuations=Budget.parse(["kl<=1e-6", "greedy>=1"]))
    found = {}
    for kind in ("whole", "broken"):
        if kind == "broken":
            broken(models)
        (tmp_path / kind).mkdir()
        target.emit(
            type(lowered.program)(models, lowered.program.signatures, "", lowered.program.provenance), tmp_path / kind
        )
        found[kind] = check_engines(target, tmp_path / kind, lowered.program.signatures, references)
    assert not found["whole"].violations(budgets)
    violations = found["broken"].violations(budgets)
    assert any(text.startswith("generation") for text in violations), violations
    assert len(violations) > 1 or broken is cross_attention_stale, violations


@pytest.mark.slow
def test_deep_stacks_of_decoders_are_written_out_with_their_caches(tmp_path: Path) -> None:
    deep = Species("llama", "text-generation", {**by_name("llama").config, "num_hidden_layers": 7})
    lowered, references = lowered_with_references(deep, tmp_path)
    model, signature = lowered.program.sole()
    assert any("_layer6" in (node.name or "") for node in model.graph)
    assert [t.name for t in signature.inputs][-2:] == ["past_key_values.6.key", "past_key_values.6.value"]
    assert [t.name for t in signature.outputs][-2:] == ["present.6.key", "present.6.value"]
    (tmp_path / "e").mkdir()
    target = registry.backend("onnxruntime")
    target.emit(lowered.program, tmp_path / "e")
    found = check_engines(target, tmp_path / "e", lowered.program.signatures, references)
    assert (found.comparison().worst("max_rel") or 0) < 1e-5
    assert found.comparison().worst("greedy") == 1


@pytest.mark.slow
def test_components_of_an_encoder_decoder_share_their_weights(t5: tuple[Lowered, References], tmp_path: Path) -> None:
    registry.backend("onnxruntime").emit(t5[0].program, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx.data",
    }  # fmt: skip
    used = {}
    for name in ("decoder_model", "decoder_with_past_model"):
        graph = ir.load(tmp_path / f"{name}.onnx").graph
        tensors = {v.name: v.const_value for v in graph.initializers.values()}
        used[name] = {key: t.offset for key, t in tensors.items() if isinstance(t, ir.ExternalTensor)}
    shared = used["decoder_model"].keys() & used["decoder_with_past_model"].keys()
    assert len(shared) >= 10
    assert all(used["decoder_model"][key] == used["decoder_with_past_model"][key] for key in shared)


def test_what_goes_on_behind_an_encoder_is_timed_at_single_tokens(
    llama: tuple[Lowered, References], t5: tuple[Lowered, References]
) -> None:
    def tokens(signature: Signature) -> list[tuple[int, int]]:
        return [(sizes["sequence"], sizes["past"]) for sizes in default_shapes(signature)]

    assert tokens(t5[0].program.signatures["decoder_with_past_model"]) == [(1, 128)]
    assert tokens(llama[0].program.sole()[1]) == [(128, 0), (1, 128)]


class Scripted(Decoding):
    """Scores that were written down: no engine."""

    def __init__(self, rows: list[list[int]], vocabulary: int = 8) -> None:
        self._script = [np.eye(vocabulary, dtype=np.float32)[list(row)] for row in zip(*rows, strict=True)]
        self._place = 0

    def start(self, prompt: Any, start_tokens: Any = None) -> np.ndarray:
        return np.asarray(self._script[0])

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        self._place += 1
        return np.asarray(self._script[self._place])


def test_generation_stops_when_all_texts_have_ended() -> None:
    prompt = {"input_ids": np.ones((2, 1), np.int64)}
    tokens = list(Scripted([[3, 7, 4, 4], [4, 5, 7, 4]]).generate(prompt, most=9, ends=frozenset({7})))
    assert [list(step) for step in tokens] == [[3, 4], [7, 5], [7, 7]]


def test_sampling_is_reproducible_and_bounded() -> None:
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(400, axis=0)
    draws = {seed: Sampling(1.0, seed=seed).chooser()(scores) for seed in (0, 1)}
    assert (draws[0] == Sampling(1.0, seed=0).chooser()(scores)).all()
    assert (draws[0] != draws[1]).any()
    assert set(draws[0]) == {0, 1, 2, 3}
    assert abs((draws[0] == 0).mean() - 0.5) < 0.1
    assert set(Sampling(1.0, top_k=2).chooser()(scores)) == {0, 1}
    assert set(Sampling(1.0, top_p=0.79).chooser()(scores)) == {0, 1}
    assert set(Sampling(0.0).chooser()(scores)) == {0}


@pytest.mark.breadth
def test_an_output_of_a_decoder_is_verified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize(build(by_name("t5"), tmp_path / "c"), tmp_path / "out", targets=TARGETS, clock=all_equal)
    verdicts = verify(tmp_path / "out")
    assert {name: verdict.problems for name, verdict in verdicts.items()} == dict.fromkeys(TARGETS, ())
    assert all("generation.next token" in (v.comparison.outputs if v.comparison else {}) for v in verdicts.values())
    monkeypatch.setattr(
        "planish.optimizer.driver.bench.time_against_first", lambda engines, _: [Timing(1, 1, 1, 1, 1) for _ in engines]
    )
    rows = [(row.component, Path(row.label.split()[0]).name, row.shape) for row in bench([tmp_path / "out"])]
    assert [row[:2] for row in rows if row[0] == "encoder_model"] == [("encoder_model", target) for target in TARGETS]
    (step,) = [
        shape
        for name, target, shape in rows
        if (name, target) == ("decoder_with_past_model", "openvino") and "sequence=1," in shape
    ]
    assert {"batch=1", "past=47"} <= set(step.split(","))


@pytest.mark.breadth
def test_locked_builds_are_equal_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = build(by_name("t5"), tmp_path / "c")
    for name in ("one", "other"):
        optimize(checkpoint, tmp_path / name, targets=TARGETS, lock=tmp_path / "lock", clock=all_faster)
    files = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "other")
    }
    different = {str(path) for path in files["one"] if files["one"][path] != files["other"].get(path)}
    assert files["one"].keys() == files["other"].keys()
    assert different == MEASURED


def configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", configured(rope_parameters={"rope_type": "spiral"}), "knows no rope_type 'spiral'; there are: "),
        ("qwen2", without("model.embed_tokens.weight"), "has no weights for lm_head.weight, model.embed_tokens.weight"),
        ("llama", without("lm_head.weight"), "has no weights for lm_head.weight of LlamaForCausalLM"),
        ("t5", without("shared.weight"), "has no weights for encoder.embed_tokens.weight"),
    ],
)
def test_broken_checkpoints_are_refused(name: str, change: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    checkpoint = build(by_name(name), tmp_path / "c")
    change(checkpoint)
    with pytest.raises(BadInput) as refused:
        lower(checkpoint)
    assert says in str(refused.value)


def test_a_model_without_a_cache_is_no_decoder(tmp_path: Path) -> None:
    checkpoint = build(Species("bert", "fill-mask"), tmp_path / "c")
    with pytest.raises(BadInput, match=r"has no head for text2text-generation"):
        lower(checkpoint, "text2text-generation")
