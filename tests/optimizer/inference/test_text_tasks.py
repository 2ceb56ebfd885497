"""`planish run`: the engine's answers are those of PyTorch with the same tokenizer, for each task."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.answer_files import answer_file, answer_lines, partial_file
from planish.optimizer.inference.answer_options import AnswerOptions
from planish.optimizer.inference.postprocessing import classes
from planish.optimizer.inference.requests import TextRequest, read_texts
from planish.optimizer.inference.session import open_task, with_options
from planish.optimizer.inference.text_tasks import TextTasks
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays, TensorSpec
from planish.optimizer.system import interrupts
from tests.clocks import all_equal
from tests.conftest import Planish, with_tokenizer
from tests.optimizer.cli.test_bad_input import run
from tests.zoo import Species, build

pytestmark = pytest.mark.slow
Made = Callable[[str], tuple[TextTasks, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Name of a task -> the opened task and its checkpoint; each is built once, and nothing is timed."""
    built: dict[str, tuple[TextTasks, Path]] = {}

    def make(name: str) -> tuple[TextTasks, Path]:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = with_tokenizer(build(Species("bert", name), folder / "checkpoint"))
            optimize(checkpoint, folder / "out", clock=all_equal)
            task = open_task(folder / "out")
            assert isinstance(task, TextTasks)
            built[name] = task, checkpoint
        return built[name]

    return make


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
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "single_label_classification"},
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


def test_a_file_is_answered_in_order_and_goes_on_where_it_stopped(made: Made, tmp_path: Path) -> None:
    task, _ = made("text-classification")
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"w{index} w{index + 1}"}) + "\n" for index in range(9)))
    assert answer_file(task, source, tmp_path / "whole.jsonl", batch=4) == 9
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["index"] for line in lines] == list(range(9))
    assert lines[5]["scores"] == pytest.approx(task.answer([TextRequest("w5 w6")])[0]["scores"], abs=1e-5)

    def stop(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(task, source, tmp_path / "again.jsonl", 4, stop)
    assert not (tmp_path / "again.jsonl").exists()
    (partial,) = tmp_path.glob(".again.jsonl.*.partial")
    partial.write_bytes(partial.read_bytes() + b'{"index": 4, "la')  # as if killed in the middle of a line
    assert answer_file(task, source, tmp_path / "again.jsonl", 4) == 5
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    assert not partial.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w1"}\n{"text": 3}\n', "line 2: this line has no field 'text'"),
        ('{"text": "w1"}\n{broken\n', "line 2: this is not JSON"),
        ("\n\n", "this file holds no text"),
        (
            '{"text": "w1"}\n{"text": "w2", "choices": ["a"]}\n',
            "line 2: an engine for text-classification does not look",
        ),
        ('{"text": "\\ud800"}\n', "line 1: this is not Unicode text"),
        ('{"text": "w1"}\n{"text": "\u00e9"}\n'.encode("latin-1"), "line 2: byte 11 of this line (0xe9) is not UTF-8"),
        ('{"text": "w1"}\n'.encode("utf-16"), "this is text in UTF-16, not in UTF-8; save it in UTF-8"),
    ],
)
def test_bad_files(content: str | bytes, message: str, made: Made, tmp_path: Path) -> None:
    task, _ = made("text-classification")
    (tmp_path / "texts.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    files = ["--input", tmp_path / "texts.jsonl", "--output", tmp_path / "answers.jsonl"]
    code, said = run("run", task.folder.parent, *files)
    assert (code, message in said) == (3, True), said
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_mark_of_utf_8_and_ends_of_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes("w1 w2\r\n\r\nw3\r\n".encode("utf-8-sig"))
    assert [question.text for question in read_texts(tmp_path / "texts.txt")] == ["w1 w2", "w3"]


def test_ids_come_back(made: Made, tmp_path: Path) -> None:
    task, _ = made("text-classification")
    (tmp_path / "texts.jsonl").write_text('{"text": "w1", "id": "a-1"}\n{"text": "w2"}\n{"id": [7], "text": "w3"}\n')
    answer_file(task, tmp_path / "texts.jsonl", tmp_path / "answers.jsonl", 2)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(line["index"], line.get("id")) for line in lines] == [(0, "a-1"), (1, None), (2, [7])]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_an_index_is_that_of_the_line(kind: str, made: Made, tmp_path: Path) -> None:
    """Blank lines ask nothing, but whoever lays the answers beside the lines counts them."""
    task, _ = made("text-classification")
    texts = ["", "w1", "", " \t", "w2", "w3", "", "w4", ""]
    lines = [text if kind == "txt" or not text.strip() else json.dumps({"text": text}) for text in texts]
    source, output = tmp_path / f"texts.{kind}", tmp_path / "answers.jsonl"
    source.write_text("\n".join(lines))
    partial = partial_file(task, source, output)
    partial.write_text("".join(next(answer_lines(task, task.requests(source), 2))))  # as if interrupted then
    assert answer_file(task, source, output, 2) == 2
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["index"] for answer in answers] == [1, 4, 5, 7]
    for answer in answers:
        assert answer["scores"] == pytest.approx(task.answer([TextRequest(texts[answer["index"]])])[0]["scores"])


def test_standard_input_and_output(made: Made, tmp_path: Path, planish: Planish) -> None:
    out = made("text-classification")[0].folder.parent
    asked = '{"text": "w1", "id": 7}\n{"text": "w2 w3"}\n'
    (tmp_path / "texts.jsonl").write_text(asked)
    piped = planish("run", out, "--input", "-", "--format", "jsonl", "--output", "-", input=asked)
    assert piped.returncode == 0, piped.stderr
    assert [json.loads(line).get("id") for line in piped.stdout.splitlines()] == [7, None]
    assert planish("run", out, "--input", tmp_path / "texts.jsonl", "--output", "-").stdout == piped.stdout
    done = planish("run", out, "--input", "-", "--format", "jsonl", "--output", tmp_path / "a.jsonl", input=asked)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.jsonl").read_text() == piped.stdout
    empty = planish("run", out, "--input", "-", "--output", tmp_path / "b.jsonl", input="")
    assert (empty.returncode, empty.stderr) == (3, "planish: error: standard input: this file holds no text\n")
    refused = planish("run", out, "--input", tmp_path / "texts.jsonl", "--format", "txt", "--output", "-")
    assert (refused.returncode, "it is for standard input" in refused.stderr) == (2, True)


def test_a_closed_standard_output_is_said(made: Made) -> None:
    command = [sys.executable, "-m", "planish.optimizer.cli", "run", made("text-classification")[0].folder.parent]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *map(str, command), "--text", "w1"]
    done = subprocess.run(closed, capture_output=True, text=True)
    assert (done.returncode, "standard output: this cannot be" in done.stderr) == (3, True), done.stderr


@pytest.mark.parametrize(
    ("place", "arguments", "message"),
    [
        ("onnxruntime/model.onnx", ["--text", "w1"], "this is a file; give its folder"),
        (".", ["--text", "w1 \udcff"], "--text: this is not Unicode text"),
        (".", ["--input", "{folder}", "--output", "{folder}/a.jsonl"], "this is a folder"),
        (".", ["--input", "{folder}/t.txt", "--output", "{folder}/gone/a.jsonl"], "gone: there is no such folder"),
    ],
)
def test_what_run_cannot_use(place: str, arguments: list[str], message: str, made: Made, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("w1\n")
    out = made("text-classification")[0].folder.parent
    code, said = run("run", out / place, *(part.format(folder=tmp_path) for part in arguments))
    assert (code, message in said) == (3, True), said


def test_an_interrupted_run_says_what_is_kept(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made("text-classification")[0].folder.parent
    (tmp_path / "texts.txt").write_text("w1\nw2\nw3\n")
    answer, asked = TextTasks.answer, [0]

    def interrupted(self: TextTasks, questions: Any) -> Any:
        asked[0] += 1
        if asked[0] == 3:
            raise KeyboardInterrupt
        return answer(self, questions)

    monkeypatch.setattr(TextTasks, "answer", interrupted)
    told: list[str] = []
    monkeypatch.setattr(interrupts, "report", lambda kind, text, *_: told.append(text) if kind == "kept" else None)
    files = ["--input", tmp_path / "texts.txt", "--output", tmp_path / "answers.jsonl", "--batch", 1]
    code, said = run("run", out, *files)
    (partial,) = tmp_path.glob(".answers.jsonl.*.partial")
    assert code == 130
    assert f"planish: interrupted; 2 of 3 answers are kept in {partial}; run again to go on" in said
    # A process that watches this one is told at once: one that is killed tells nothing any more.
    assert told == [f"{count} of 3 answers are kept in {partial}; run again to go on" for count in (1, 2)]
    assert run("run", out, *files)[0] == 0
    assert [text.split()[0] for text in told] == ["1", "2", "2", "3"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("changed", ["planish.json", "onnxruntime/model.onnx"])
def test_answers_of_another_engine_are_not_gone_on_with(changed: str, made: Made, tmp_path: Path) -> None:
    """The same folder with another engine in it: its manifest tells, and the files where there is none."""
    out = Path(shutil.copytree(made("text-classification")[0].folder.parent, tmp_path / "out"))
    if changed != "planish.json":
        (out / "planish.json").unlink()
    task = open_task(out / "onnxruntime")
    (tmp_path / "texts.txt").write_text("w1\n")
    files = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    before = partial_file(task, *files)
    assert partial_file(task, *files) == before
    (out / changed).write_bytes((out / changed).read_bytes() + b"\n")
    assert partial_file(task, *files) != before


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


def test_what_stands_there_is_not_overwritten(made: Made, tmp_path: Path) -> None:
    task, _ = made("text-classification")
    (tmp_path / "texts.txt").write_text("w1\n")
    (tmp_path / "answers.jsonl").write_text("precious")
    with pytest.raises(BadInput, match="this file exists"):
        answer_file(task, tmp_path / "texts.txt", tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_text() == "precious"


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
