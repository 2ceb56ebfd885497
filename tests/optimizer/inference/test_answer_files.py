"""Files of texts in, files of answers out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.answer_files import answer_file, answer_lines, partial_file
from planish.optimizer.inference.requests import TextRequest, read_texts
from planish.optimizer.inference.session import open_task
from planish.optimizer.inference.text_tasks import TextTasks
from planish.optimizer.system import interrupts
from tests.conftest import Planish
from tests.optimizer.cli.test_bad_input import run
from tests.optimizer.inference.conftest import Made

pytestmark = pytest.mark.slow


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


def test_what_stands_there_is_not_overwritten(made: Made, tmp_path: Path) -> None:
    task, _ = made("text-classification")
    (tmp_path / "texts.txt").write_text("w1\n")
    (tmp_path / "answers.jsonl").write_text("precious")
    with pytest.raises(BadInput, match="this file exists"):
        answer_file(task, tmp_path / "texts.txt", tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_text() == "precious"
