"""`verify` and whatever opens an output: what nobody wrote, tasks of other engines, links that lead outside."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from planish.optimizer import load, optimize
from planish.optimizer.errors import BadInput
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.cases import load_cases
from tests.clocks import all_faster
from tests.conftest import Planish
from tests.optimizer.cli.test_bad_input import run
from tests.optimizer.driver.test_tampered import (
    BAD_INPUT,
    DONE,
    FAILED,
    Outputs,
    check,
    forged,
    outputs_in,
    time_nothing,
)
from tests.zoo import Species, build


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    time_nothing(monkeypatch)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return outputs_in(tmp_path_factory.mktemp("outputs"))


@pytest.fixture
def out(request: pytest.FixtureRequest, outputs: Outputs, tmp_path: Path) -> Path:
    """A copy of an output, to be changed."""
    return Path(shutil.copytree(outputs(getattr(request, "param", "classifier")), tmp_path / "out"))


def failed(code: int, message: str, *arguments: object) -> None:
    """The command must fail with ``code`` and one line of an error, which holds ``message``."""
    got, said = run(*arguments)
    assert (got, message in said) == (code, True), said
    assert len([line for line in said.splitlines() if line.startswith("planish: error: ")]) == 1, said


@pytest.mark.slow
def test_perplexity_of_scores_that_are_kept_in_part_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts over a large vocabulary are, short ones beside them are not."""
    monkeypatch.setattr("planish.optimizer.runtime.cases._ELEMENTS", 2000)
    checkpoint, out = build(Species("llama", "text-generation", {}), tmp_path / "checkpoint"), tmp_path / "out"
    passes = "pack-projections,quantize-weights{minimum=0}"
    optimize(checkpoint, out, targets="onnxruntime", pipeline=passes, keep="perplexity<=1.5x", clock=all_faster)
    names = [set(case) for case in load_cases(out / "reference" / "outputs.safetensors")]
    assert {"logits/best" in each for each in names} == {True, False}
    assert all(("logits/next" in each) == ("logits/best" in each) for each in names)
    code, said = run("verify", out)
    assert code == DONE, said
    assert "perplexity" in Manifest.read(out).targets["onnxruntime"].comparison["model.logits"]


@pytest.mark.slow
@pytest.mark.parametrize("left", [(), ("onnxruntime/model.onnx", "reference/inputs.safetensors")])
def test_files_that_no_manifest_lists_fail(left: tuple[str, ...], out: Path) -> None:
    """What is not listed was not written by a build: its numbers alone prove nothing."""
    manifest = Manifest.read(out)
    manifest.model_copy(update={"files": {name: manifest.files[name] for name in left}}).write(out)
    failed(FAILED, "planish.json does not list 'onnxruntime/", "verify", out)


@pytest.mark.slow
def test_a_file_beside_an_engine_that_was_added_fails(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    (out / "onnxruntime" / "model.plan").write_text("")  # build.py writes it later
    assert check(out, "verify") == {DONE}
    (out / "onnxruntime" / "added_tokens.json").write_text("{}")  # a tokenizer would read it
    failed(FAILED, "planish.json does not list 'onnxruntime/added_tokens.json'", "verify", out)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["writer"], indirect=True)
def test_continuations_that_are_gone_fail(out: Path) -> None:
    """Without them nothing would be said of what the engine writes."""
    manifest, gone = Manifest.read(out), "reference/continuations.safetensors"
    (out / gone).unlink()
    failed(FAILED, "continuations.safetensors is missing", "verify", out)
    left = {name: digest for name, digest in manifest.files.items() if name != gone}
    manifest.model_copy(update={"files": left}).write(out)
    failed(FAILED, "nothing holds generation against its budget", "verify", out)


@pytest.mark.slow
def test_the_row_of_a_failed_engine_says_what_failed(out: Path, command: Planish) -> None:
    (out / "onnxruntime" / "config.json").write_text("{}")
    *_, row = command("verify", out).stdout.splitlines()
    assert re.split("  +", row)[:2] == ["onnxruntime", "failed"]
    assert row.endswith("  onnxruntime/config.json is not the file that was written")
    forged(out, "onnxruntime/config.json")
    manifest = Manifest.read(out)
    record = manifest.targets["onnxruntime"].model_copy(update={"budgets": {"model": "max_abs<=-1"}})
    manifest.model_copy(update={"targets": {"onnxruntime": record}}).write(out)
    *_, row = command("verify", out).stdout.splitlines()
    assert re.search(r"  max_abs of logits is \S+, the budget asks max_abs<=-1$", row), row


TASKS = [
    ("classifier", "text-clasification"),
    ("classifier", ""),
    ("classifier", "inference"),
    ("classifier", "token-classification"),
    ("classifier", "question-answering"),
    ("classifier", "multiple-choice"),
    ("classifier", "feature-extraction"),
    ("classifier", "text-generation"),
    ("classifier", "text2text-generation"),
    ("tagger", "text-classification"),
    ("writer", "fill-mask"),
    ("writer", "text2text-generation"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("out", "task"), TASKS, indirect=["out"])
def test_a_task_of_another_engine_is_refused(out: Path, task: str) -> None:
    path = out / "planish.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": task}))
    failed(BAD_INPUT, f"{path}: task: ", "verify", out)


LINKS = [
    "onnxruntime/model.onnx",
    "onnxruntime/config.json",
    "onnxruntime/tokenizer.json",
    "reference/inputs.safetensors",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", LINKS)
def test_links_are_followed_inside_an_output_only(name: str, out: Path, outputs: Outputs, tmp_path: Path) -> None:
    elsewhere = outputs("classifier") / name
    (out / name).unlink()
    (out / name).symlink_to(elsewhere)
    asked: list[tuple[object, ...]] = [(name, "verify", out)]
    if name.startswith("onnxruntime"):
        asked += [(name, "run", place, "--text", "w1") for place in (out, out / "onnxruntime")]
        for folder in (out, out / "onnxruntime"):
            with pytest.raises(BadInput, match="link to a file outside"):
                load(folder)
    if name == "onnxruntime/model.onnx":
        asked += [(name, "bench", place) for place in (out, out / "onnxruntime")]
        asked += [(name, "bisect", out, "--pipeline", "remove-unused-nodes")]
    for file, *words in asked:
        failed(BAD_INPUT, f"{out}/{file}: this is a link to a file outside", *words)
    (out / name).unlink()
    (out / "kept").mkdir()
    shutil.copy(elsewhere, out / "kept" / "file")
    (out / name).symlink_to(out / "kept" / "file")
    (tmp_path / "link").symlink_to(out)  # a folder may be reached through links
    assert check(tmp_path / "link", "verify", "run") == {DONE}


@pytest.mark.slow
def test_folders_that_are_linked_into_an_engine(out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (out / "onnxruntime" / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    for asked in (("run", out, "--text", "w1"), ("run", out / "onnxruntime", "--text", "w1"), ("verify", out)):
        failed(BAD_INPUT, "1_Pooling: this is a link to a folder outside", *asked)


@pytest.mark.slow
def test_an_output_in_the_cache_of_the_hub_is_links(out: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--mine"
    snapshot = repository / "snapshots" / "1a2b3c"
    for number, file in enumerate(sorted(path for path in out.rglob("*") if path.is_file())):
        place, blob = snapshot / file.relative_to(out), repository / "blobs" / str(number)
        for path in (place, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        place.symlink_to(blob)
    assert check(snapshot, "verify", "run", "bench") == {DONE}
