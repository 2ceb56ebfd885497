"""What is calibrated on: the user's data and not the reference, what the model writes itself, or what is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer import optimize
from planish.optimizer.calibration.data import Samples, one_behind_the_other
from planish.optimizer.calibration.self_generated import SelfGeneratedData
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.recipe import Recipe, When
from planish.optimizer.ir.program import Axis, Role, Signature, TensorSpec
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from planish.optimizer.output.lock import Lock
from planish.optimizer.pipeline import presets
from planish.optimizer.runtime.array_files import fitted
from tests.clocks import all_faster, each_faster
from tests.train import MODELS, pairs

ARRAYS = Signature((TensorSpec("x", ir.DataType.FLOAT, ("batch", 2), Role.VALUES),), ())
STATIC = "quantize-int8{activations=static minimum=1}"


def texts(count: int) -> list[str]:
    return [" ".join(f"w{(7 * number + place) % 90}" for place in range(3 + number % 5)) for number in range(count)]


def rows(cases: list[Any]) -> int:
    return sum(len(case["input_ids"]) for case in cases)


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> tuple[Signature, Any]:
    return lower(tiny).program.sole()[1], load_tokenizer(tiny)


def test_what_is_measured_on_is_not_calibrated_on(tokens: tuple[Signature, Any], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(texts(100)))
    for given in (tmp_path / "texts.txt", texts(100), iter(texts(100))):
        samples = Samples.of(given, 50)
        reference, batches = samples.reference(*tokens), list(samples.batches(*tokens))
        assert (rows(reference), rows(batches)) == (32, 50)
        first = samples.reference(*tokens)[0]["input_ids"]
        assert not any(np.array_equal(first, case["input_ids"][:1, : first.shape[1]]) for case in batches[:8])
    few = Samples.of(texts(40))
    assert (rows(few.reference(*tokens)), rows(list(few.batches(*tokens)))) == (32, 40)  # not enough to part


def test_arrays_by_name_from_python() -> None:
    cases = [{"x": np.full((1, 2), number, np.float32)} for number in range(20)]
    samples = Samples.of(cases)
    assert [case["x"][0, 0] for case in samples.reference(ARRAYS, None)] == list(range(8))
    assert [case["x"][0, 0] for case in samples.batches(ARRAYS, None)] == list(range(8, 20))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "hold nothing"),
        ([{"y": np.zeros((1, 2), np.float32)}], "it has no array 'x'"),
        ([{"x": np.array([["a", "b"]])}], "is <U1, not float32"),
        ([{"x": np.full((1, 2), np.nan, np.float32)}], "holds NaN or infinity"),
        ([{"x": np.zeros((1, 3), np.float32)}], "has shape \\[1, 3\\]"),
        ([{"x": np.zeros((1, 2), np.float32)}, "w1"], "some of them are arrays"),
    ],
)
def test_data_that_do_not_fit_are_one_line(given: list[Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Samples.of(given).reference(ARRAYS, None)


def test_texts_among_which_is_none(tokens: tuple[Signature, Any]) -> None:
    with pytest.raises(BadInput, match="entry 1: it is int, not a text"):
        Samples.of(cast("list[str]", ["w1", 5])).reference(*tokens)


def test_the_longest_input_is_made_of_the_users_texts(tokens: tuple[Signature, Any]) -> None:
    given = Samples.of(texts(6)).reference(*tokens)
    longest = {name: np.ones((1, 48), np.int64) for name in ("input_ids", "attention_mask")}
    made = one_behind_the_other(given, longest, tokens[0])
    known = np.concatenate([case["input_ids"][case["attention_mask"] != 0] for case in given])
    np.testing.assert_array_equal(made["input_ids"][0], np.resize(known, 48))


@pytest.mark.slow
def test_fixed_steps_race_where_there_are_data_and_a_lock_repeats_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = (Recipe(("quantize-int8{minimum=1}",)), Recipe((STATIC,), When.CALIBRATED))
    monkeypatch.setattr(OnnxRuntime, "presets", {"fast": recipes})
    options: Any = {"preset": "fast", "shapes": [{"sequence": 8}], "clock": each_faster}
    without = optimize(tiny, tmp_path / "without", **options)
    assert without.manifest.reference.calibrated_on == "nothing"
    options |= {"calibration": texts(80), "lock": tmp_path / "lock"}
    built = optimize(tiny, tmp_path / "with", **options)
    assert built.manifest.reference.calibrated_on == "given"
    choice = Lock.read(tmp_path / "lock").targets["onnxruntime"]
    (tried,) = choice.tried
    assert (tried.passes, tried.kept) == ("quantize-int8{minimum=1 activations=static}", True)
    assert "activations=static" in choice.pipelines["model"]
    assert all(one.noise > 0 for one in choice.products)
    assert {one.rounded for one in choice.products if one.text == "quantize-int8{minimum=1}"} == {False}
    again = optimize(tiny, tmp_path / "again", **options)
    assert again.manifest.targets == built.manifest.targets
    with pytest.raises(UsageError, match="samples of nothing"):
        optimize(tiny, tmp_path / "other", preset="fast", samples=5)
    for other in ({"calibration": texts(81)}, {"calibration": None}, {"samples": 40}):
        with pytest.raises(UsageError, match="calibrated on other data"):
            optimize(tiny, tmp_path / "other", **{**options, **other})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "origin"), [("tiny", "made from the signature"), ("writer", "written by the model itself")]
)
def test_made_up_data_are_told(source: str, origin: str, tiny: Path, tmp_path: Path) -> None:
    told: list[str] = []
    folder = tiny if source == "tiny" else MODELS / source
    built = optimize(
        folder, tmp_path / "out", pipeline=STATIC, keep=["cosine>=0.1"], shapes=[{"sequence": 8}],
        progress=lambda stage, *_: told.append(stage), clock=each_faster,
    )  # fmt: skip
    assert built.notes == [f"calibrated on inputs {origin}, which are not like yours: give --calibration"]
    assert built.manifest.reference.calibrated_on == origin
    assert any("observations" in stage for stage in told)


@pytest.mark.breadth
def test_the_decoder_of_an_encoder_decoder_hears_answers(tmp_path: Path) -> None:
    program = lower(MODELS / "translator").program
    rehearsal = SelfGeneratedData(program.components, registry.backend("onnxruntime").load)
    first = next(iter(program.signatures.values()))
    prompts = Samples.of([prompt for prompt, _ in pairs(held_out=True)[:4]]).reference(
        first, load_tokenizer(MODELS / "translator")
    )
    heard = list(rehearsal.parts("decoder_with_past_model", prompts[:1], np.zeros(1, np.int64)))
    lengths = [next(a.shape[2] for n, a in case.items() if ".decoder." in n) for case in heard]
    assert lengths == list(range(1, len(heard) + 1))
    assert len({tuple(case["input_ids"].ravel()) for case in heard}) > 3  # it answers, and does not repeat one token
    built = optimize(
        MODELS / "translator", tmp_path / "out", targets=["onnxruntime"], pipeline=STATIC, keep=["cosine>=0.1"],
        calibration=[prompt for prompt, _ in pairs(held_out=False)[:70]], clock=each_faster,
    )  # fmt: skip
    steps = built.manifest.targets["onnxruntime"].passes
    assert {step.component for step in steps if step.sites} == set(program.signatures)


@pytest.mark.slow
def test_perplexity_is_a_budget(tmp_path: Path) -> None:
    built = optimize(
        MODELS / "writer", tmp_path / "out", pipeline="quantize-weights{bits=4 minimum=1 method=gptq}",
        keep=["perplexity<=1.2x"], calibration=["Return a list of names in the file."] * 70, clock=all_faster,
    )  # fmt: skip
    found = built.manifest.targets["onnxruntime"].comparison["model.logits"]["perplexity"]
    assert 0.8 < found < 1.2


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_small_chooses_its_integers_by_data_if_there_are_any(target: str) -> None:
    text = {known: presets.pipeline_text("small", target, calibrated=known) for known in (False, True)}
    assert text[True].replace(" method=gptq", "") == text[False]
    assert text[True].count("bits=4 method=gptq") == text[False].count("bits=4") == 2


def decoder(*more: TensorSpec) -> Signature:
    integers, floats = ir.DataType.INT64, ir.DataType.FLOAT
    inputs = (
        TensorSpec("input_ids", integers, ("batch", "sequence"), Role.TOKENS, bound=9),
        TensorSpec("attention_mask", integers, ("batch", "past + sequence"), Role.MASK),
        TensorSpec("position_ids", integers, ("batch", "sequence"), Role.POSITIONS),
        TensorSpec("past_key_values.0.key", floats, ("batch", 2, "past", 4), Role.CACHE),
        *more,
    )
    return Signature(
        inputs, (), {name: Axis(name, 0 if name == "past" else 1) for name in ("batch", "sequence", "past")}
    )


def test_token_ids_may_come_alone() -> None:
    segments = TensorSpec("token_type_ids", ir.DataType.INT64, ("batch", "sequence"), Role.SEGMENTS)
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    found = fitted({"input_ids": ids}, decoder(segments), "data")
    assert (found["attention_mask"] == 1).all()
    assert (found["position_ids"] == [0, 1, 2]).all()
    assert not found["token_type_ids"].any()
    assert found["past_key_values.0.key"].shape == (2, 2, 0, 4)
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    padded = fitted({"input_ids": ids, "attention_mask": mask}, decoder(), "data")
    assert padded["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]


def test_what_does_not_fit_beside_token_ids_is_refused() -> None:
    ids = np.array([[3, 4, 5]])
    with pytest.raises(BadInput, match=r"'attention_mask' has 4 along 'past \+ sequence', which does not fit"):
        fitted({"input_ids": ids, "attention_mask": np.ones((1, 4), np.int64)}, decoder(), "data")
    past = np.zeros((1, 2, 5, 4), np.float32)  # what comes before them is not nothing: the rest must be told
    with pytest.raises(BadInput, match="no array 'attention_mask'"):
        fitted({"input_ids": ids, "past_key_values.0.key": past}, decoder(), "data")


@pytest.mark.slow
def test_without_a_reference_data_are_looked_at_first_and_used(tmp_path: Path) -> None:
    ids = [{"input_ids": np.random.default_rng(i).integers(5, 1000, (1, 12))} for i in range(20)]
    options: Any = {"pipeline": "quantize-weights{bits=4 minimum=1 method=gptq}", "reference": "none"}
    with pytest.raises(BadInput, match="no array 'input_ids'"):
        optimize(MODELS / "writer", tmp_path / "bad", **options, calibration=[{"ids": ids[0]["input_ids"]}])
    assert not list(tmp_path.iterdir())  # no model of a failed pass beside it
    built = optimize(MODELS / "writer", tmp_path / "out", **options, calibration=ids)
    (step,) = [one for one in built.manifest.targets["onnxruntime"].passes if one.sites]
    assert (step.text, step.sites) == (options["pipeline"].replace("bits=4 minimum=1", "minimum=1 bits=4"), 1)
