"""Engines of one size: they take no other, answer as those of any size do, and are checked with padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planish.optimizer import Pipeline, optimize
from planish.optimizer.calibration.data import Samples
from planish.optimizer.compilation.result import Result
from planish.optimizer.errors import UsageError
from planish.optimizer.fidelity.reference import References
from planish.optimizer.inference.answer_options import AnswerOptions
from planish.optimizer.inference.requests import TextRequest
from planish.optimizer.inference.session import open_task, with_options
from planish.optimizer.inference.text_generation import TextGenerator
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from planish.optimizer.output.manifest import Manifest
from tests.clocks import all_faster
from tests.conftest import Planish
from tests.train import MODELS

pytestmark = pytest.mark.slow
TARGETS = ("onnxruntime", "openvino")
SIZES = {"batch": 2, "sequence": 16}
TEXTS = ["w1", "w2 w3 w4", "w5 w6", "w7 " * 30, "w8 w9"]


def test_only_this_size_is_taken_and_the_answers_are_the_same(tiny: Path, tmp_path: Path) -> None:
    free = optimize(tiny, tmp_path / "free", targets=TARGETS, clock=all_faster)
    fixed = optimize(tiny, tmp_path / "fixed", targets=TARGETS, fix=SIZES, clock=all_faster)
    for target in TARGETS:
        assert all(tensor.shape == (2, 16) for tensor in fixed.engines[target].inputs)
        assert fixed.engines[target].outputs[0].shape == (2, 3)
        short = [text for text in TEXTS if len(text) < 30]
        found, wanted = (answers(folder / target, short) for folder in (fixed.folder, free.folder))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    (cut,) = open_task(fixed.folder / "onnxruntime").answer([TextRequest(TEXTS[3])])
    assert cut["truncated"] is True
    assert fixed.manifest.requested["fixed"] == "batch=2,sequence=16"


def answers(folder: Path, texts: list[str]) -> list[list[float]]:
    """The probabilities of each class, by the name of the class."""
    found = open_task(folder).answer([TextRequest(text) for text in texts])
    return [[answer["scores"][name] for name in sorted(answer["scores"])] for answer in found]


def test_padding_is_among_the_cases(tiny: Path, tmp_path: Path) -> None:
    result = optimize(tiny, tmp_path / "out", fix={"sequence": 16, "batch": 1}, clock=all_faster)
    cases = references(result).components["model"].inputs
    assert {case["attention_mask"].shape for case in cases} == {(1, 16)}
    assert {int(case["attention_mask"].sum()) for case in cases} == {2, 16}
    (tmp_path / "texts.txt").write_text("w1\nw2 w3\nw4\nw5 w6 w7\n")
    signature = result.manifest.signatures["model"].signature()
    read = Samples.of(tmp_path / "texts.txt").reference(signature, load_tokenizer(tiny))
    assert {case["input_ids"].shape for case in read} == {(1, 16)}
    assert len(read) == 4


def references(result: Result) -> References:
    record = Manifest.read(result.folder).reference
    return References.load(result.folder / "reference", record.noise, record.origin)


@pytest.mark.breadth
def test_a_decoder_of_two_texts_writes_what_one_of_any_number_does(tmp_path: Path) -> None:
    prompts = [TextRequest(text) for text in ("Return a list of", "The file is closed when", "Raise")]
    written = {}
    for name, fix in (("free", None), ("fixed", {"batch": 2})):
        optimize(MODELS / "writer", tmp_path / name, targets=TARGETS, fix=fix, clock=all_faster)
        for target in TARGETS:
            writer = open_task(tmp_path / name / target)
            assert isinstance(writer, TextGenerator)
            written[name, target] = with_options(writer, AnswerOptions(max_new_tokens=12)).answer(prompts)
    assert written["fixed", "onnxruntime"] == written["free", "onnxruntime"]
    assert written["fixed", "openvino"] == written["free", "onnxruntime"]


def test_what_cannot_be_fixed(tiny: Path, tmp_path: Path, command: Planish) -> None:
    for fix, words in (
        ({"height": 3}, r"no input has an axis 'height'.*there are: batch, sequence"),
        ({"sequence": 1000}, r"sequence=1000.*the model takes 1 to 48"),
    ):
        with pytest.raises(UsageError, match=words):
            optimize(tiny, tmp_path / "out", fix=fix)
    with pytest.raises(UsageError, match="this axis changes with every token"):
        optimize(MODELS / "writer", tmp_path / "out", fix={"sequence": 8})
    done = command("optimize", tiny, "-o", tmp_path / "out", "--fix", "sequence=long")
    assert done.returncode == 2 and "cannot read the sizes 'sequence=long'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_pass_says_what_a_size_is() -> None:
    assert str(Pipeline.parse("specialize-shapes{batch=1 sequence=128}")) == "specialize-shapes{batch=1 sequence=128}"
    assert Pipeline.parse("specialize-shapes{batch=1},fold-constants").fixed == {"batch": 1}
    with pytest.raises(UsageError, match="the size of an axis is a whole number"):
        Pipeline.parse("specialize-shapes{batch=few}")
