"""`planish run`: the engine's answers are those of PyTorch with the same tokenizer, for each task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.answer_options import AnswerOptions
from planish.optimizer.inference.postprocessing import classes
from planish.optimizer.inference.requests import TextRequest, read_texts
from planish.optimizer.inference.session import open_task, with_options
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays, TensorSpec
from tests.clocks import all_equal
from tests.conftest import Planish, with_tokenizer
from tests.optimizer.inference.conftest import Made
from tests.zoo import Species, build

pytestmark = pytest.mark.slow


def original(checkpoint: Path, task: str, *texts: Any) -> tuple[Any, Any]:
    """What PyTorch makes of a text (or of two): the tokens and the outputs."""
    import torch
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(checkpoint)(*texts, return_tensors="pt", padding=True)
    model = TasksManager.get_model_class_for_task(task).from_pretrained(checkpoint).eval()
    feeds = {name: tensor[None] if task == "multiple-choice" else tensor for name, tensor in encoded.items()}
    with torch.inference_mode():
        return encoded, model(**feeds)


def test_labels(made: Made) -> None:
    task, checkpoint = made("text-classification")
    (answer,) = task.answer([TextRequest("w1 w2 w3")])
    scores = original(checkpoint, "text-classification", "w1 w2 w3")[1].logits.softmax(-1)[0]
    assert answer["label"] == f"LABEL_{int(scores.argmax())}"
    for index, score in enumerate(scores.tolist()):
        assert answer["scores"][f"LABEL_{index}"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"num_labels": 1},
        pytest.param({"num_labels": 1, "problem_type": "regression"}, marks=pytest.mark.breadth),
        pytest.param({"num_labels": 3, "problem_type": "regression"}, marks=pytest.mark.breadth),
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        pytest.param({"num_labels": 3, "problem_type": "single_label_classification"}, marks=pytest.mark.breadth),
    ],
    ids=str,
)
def test_scores_are_those_of_the_pipelines_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    """One logit is a sigmoid (of softmax it would be 1 for every text), several labels at once a sigmoid each."""
    from transformers import pipeline

    checkpoint = with_tokenizer(build(Species("bert", "text-classification", config), tmp_path / "checkpoint"))
    optimize(checkpoint, tmp_path / "out", clock=all_equal)
    task = open_task(tmp_path / "out")
    asked = pipeline("text-classification", str(checkpoint), top_k=None)
    pairs = [("w1 w2", "w3 w4"), ("w1 w2", "w50 w60 w70")]
    for text, pair in pairs:
        (answer,) = task.answer([TextRequest(text, pair)])
        expected = {part["label"]: part["score"] for part in asked({"text": text, "text_pair": pair})}
        assert answer["scores"] == pytest.approx(expected, abs=1e-5)
        assert answer["score"] == max(answer["scores"].values())
        assert answer["label"] == max(expected, key=lambda name: expected[name])
        (raw,) = with_options(task, AnswerOptions(logits=True)).answer([TextRequest(text, pair)])
        logits = original(checkpoint, "text-classification", [text], [pair])[1].logits[0].tolist()
        assert raw["scores"] == pytest.approx({f"LABEL_{index}": logit for index, logit in enumerate(logits)}, abs=1e-5)


def test_scores_of_images_go_by_the_same_rules() -> None:
    logits = np.array([[0.0, 100.0, -1000.0]], np.float32)
    (several,) = classes({"problem_type": "multi_label_classification"}, {"logits": logits})
    assert several["scores"] == {"LABEL_1": 1.0, "LABEL_0": 0.5, "LABEL_2": 0.0}
    (single,) = classes({}, {"logits": np.array([[2.0]])})
    assert single["scores"] == pytest.approx({"LABEL_0": 1 / (1 + np.exp(-2))})
    (raw,) = classes({}, {"logits": logits}, raw=True)
    assert raw["scores"] == {"LABEL_1": 100.0, "LABEL_0": 0.0, "LABEL_2": -1000.0}


def test_logits_of_tags_and_choices_and_of_nothing_else(made: Made) -> None:
    task, checkpoint = made("token-classification")
    (answer,) = with_options(task, AnswerOptions(logits=True)).answer([TextRequest("w1 w2")])
    logits = original(checkpoint, "token-classification", "w1 w2")[1].logits[0, 1:-1]
    assert [token["score"] for token in answer["tokens"]] == pytest.approx(logits.max(-1).values.tolist(), abs=1e-5)
    with pytest.raises(UsageError, match="answers of task 'fill-mask' have no logits"):
        with_options(made("fill-mask")[0], AnswerOptions(logits=True))


def test_a_padded_batch_answers_as_single_texts_do(made: Made) -> None:
    task, _ = made("text-classification")
    questions = [TextRequest("w1"), TextRequest("w2 w3 w4 w5 w6"), TextRequest("w7 w8")]
    for one, many in zip([task.answer([question])[0] for question in questions], task.answer(questions), strict=True):
        assert one["scores"] == pytest.approx(many["scores"], abs=1e-5)


def test_a_text_without_a_second_one_is_no_pair(made: Made) -> None:
    """Whatever else is asked with it; an empty second text is none, as in the pipelines of transformers."""
    from transformers import pipeline

    task, checkpoint = made("text-classification")
    questions = [
        TextRequest("w1"),
        TextRequest("w1", "w3 w4"),
        TextRequest("w1", ""),
        TextRequest("w2"),
        TextRequest("w1", "w5"),
    ]
    together = task.answer(questions)
    for question, answer in zip(questions, together, strict=True):
        assert answer["scores"] == pytest.approx(task.answer([question])[0]["scores"], abs=1e-6)
    assert together[2]["scores"] == pytest.approx(together[0]["scores"], abs=1e-6)
    assert together[1]["scores"] != pytest.approx(together[0]["scores"], abs=1e-6)
    asked = pipeline("text-classification", str(checkpoint), top_k=None)
    expected = {part["label"]: part["score"] for part in asked({"text": "w1", "text_pair": ""})}
    assert together[2]["scores"] == pytest.approx(expected, abs=1e-5)


def test_second_texts_have_several_names(tmp_path: Path) -> None:
    keys = ("pair", "text_pair", "context")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "a", key: "b"}) + "\n" for key in keys))
    assert [question.pair for question in read_texts(tmp_path / "texts.jsonl")] == ["b"] * len(keys)


def test_tagged_words(made: Made) -> None:
    task, checkpoint = made("token-classification")
    (answer,) = task.answer([TextRequest("w1 w2 w3")])
    best = original(checkpoint, "token-classification", "w1 w2 w3")[1].logits[0].argmax(-1).tolist()
    assert [token["word"] for token in answer["tokens"]] == ["w1", "w2", "w3"]
    assert [token["label"] for token in answer["tokens"]] == [f"LABEL_{index}" for index in best[1:-1]]
    assert [token["start"] for token in answer["tokens"]] == [0, 3, 6]


def test_spans_lie_in_the_context(made: Made) -> None:
    task, checkpoint = made("question-answering")
    context = "w4 w5 w6 w7"
    (answer,) = task.answer([TextRequest("w1 w2", context)])
    encoded, outputs = original(checkpoint, "question-answering", "w1 w2", context)
    inside = [index for index, part in enumerate(encoded.sequence_ids(0)) if part == 1]
    start, end = outputs.start_logits[0].softmax(-1), outputs.end_logits[0].softmax(-1)
    pairs = {(i, j): float(start[i] * end[j]) for i in inside for j in inside if i <= j}
    (first, last), score = max(pairs.items(), key=lambda item: item[1])
    assert answer["answer"] == " ".join(context.split()[first - inside[0] : last - inside[0] + 1])
    assert answer["score"] == pytest.approx(score, abs=1e-6)
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    with pytest.raises(BadInput, match="a question needs a context"):
        task.answer([TextRequest("w1 w2")])


def test_words_for_the_mask(made: Made) -> None:
    task, checkpoint = made("fill-mask")
    (answer,) = task.answer([TextRequest("w1 [MASK] w3")])
    scores = original(checkpoint, "fill-mask", "w1 [MASK] w3")[1].logits[0, 2].softmax(-1)
    (found,) = answer["masks"]
    assert [word["score"] for word in found] == pytest.approx(sorted(scores.tolist(), reverse=True)[:5], abs=1e-6)
    with pytest.raises(BadInput, match=r"has no \[MASK\] to fill"):
        task.answer([TextRequest("w1 w2")])


def test_the_best_choice(made: Made) -> None:
    task, checkpoint = made("multiple-choice")
    choices = ("w4", "w5 w6", "w7 w8 w9")
    (answer,) = task.answer([TextRequest("w1 w2", None, choices)])
    scores = original(checkpoint, "multiple-choice", ["w1 w2"] * 3, list(choices))[1].logits[0].softmax(-1)
    assert answer["scores"] == pytest.approx(scores.tolist(), abs=1e-5)
    assert answer["text"] == choices[int(scores.argmax())]


def test_texts_beyond_the_limit_are_cut_and_that_is_said(made: Made) -> None:
    task, _ = made("text-classification")
    short, long = task.answer([TextRequest("w1"), TextRequest(" ".join(["w2"] * 100))])
    assert "truncated" not in short
    assert long["truncated"] is True


def test_embeddings_of_the_real_checkpoint(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over tokens, length one: what the checkpoint's own files prescribe."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    optimize(minilm, tmp_path / "out", clock=all_equal)
    texts = ["A cat sits on the mat.", "Compilers turn one text into another, step by step."]
    found = np.array([a["embedding"] for a in open_task(tmp_path / "out").answer([TextRequest(t) for t in texts])])
    encoded = AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(minilm).eval()(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(mean).numpy(), atol=1e-5)


class Projecting(Engine):
    """An encoder that gives one vector for each text and nothing else, as those of DPR do."""

    inputs = (TensorSpec("input_ids", ir.DataType.INT64, ("batch", "sequence")),)

    def __init__(self, name: str, axes: int) -> None:
        self.outputs = (TensorSpec(name, ir.DataType.FLOAT, ("batch", 4)),)
        self._axes = axes

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        counts = np.asarray(feeds["input_ids"]).sum(axis=1).astype(np.float32)
        vectors = counts.reshape(-1, *[1] * (self._axes - 1)) * np.arange(4, dtype=np.float32)
        return {self.outputs[0].name: vectors}


def test_encoders_with_a_projection_of_their_own(made: Made) -> None:
    task = replace(made("text-classification")[0], name="feature-extraction")
    for name in ("pooler_output", "text_embeds"):
        first, second = replace(task, engine=Projecting(name, 2)).answer([TextRequest("w1"), TextRequest("w2 w3")])
        assert first["embedding"] == [first["embedding"][1] * place for place in range(4)]
        assert second["embedding"][1] > first["embedding"][1] > 0
    with pytest.raises(BadInput, match=r"needs an output pooler_output of shape \(batch, size\)"):
        replace(task, engine=Projecting("pooler_output", 3)).answer([TextRequest("w1")])
    with pytest.raises(BadInput, match="needs an output last_hidden_state"):
        replace(task, engine=Projecting("logits", 2)).answer([TextRequest("w1")])


def test_the_command(made: Made, command: Planish) -> None:
    task, _ = made("text-classification")
    out = task.folder.parent
    done = command("run", out, "--text", "w1 w2", "--json")
    assert json.loads(done.stdout)["scores"] == pytest.approx(
        task.answer([TextRequest("w1 w2")])[0]["scores"], abs=1e-5
    )
    shown = command("run", out / "onnxruntime", "--text", "w1 w2").stdout
    assert shown.startswith("label: LABEL_")
    refused = command("run", out, "--text", "w1", "--target", "openvino")
    assert (refused.returncode, "there is no engine for 'openvino' here" in refused.stderr) == (3, True)
    assert command("run", out).returncode == 2
