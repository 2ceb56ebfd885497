"""Outputs that somebody changed: every command ends in a line and a documented exit code, and reads nothing outside."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.reference import References
from planish.optimizer.ir.program import Arrays
from planish.optimizer.output.manifest import Manifest, digest_of
from planish.optimizer.runtime.cases import load_cases, save_cases
from planish.optimizer.runtime.worker import EngineRef, Worker
from planish.optimizer.timing.interleaved import Timing
from tests.clocks import all_equal
from tests.conftest import with_tokenizer
from tests.optimizer.cli.test_bad_input import run
from tests.zoo import Species, build

DONE, FAILED, BAD_INPUT, ROOM = 0, 1, 3, 5
HOSTILE: list[Any] = [
    None, "", "EVIL", "__class__", "UNDEFINED", "../x", "a\0b", "x" * 5000, "\ud800", [], {}, [1], {"a": 1}, -1, 0, 3,
    2**70, 0.5, float("nan"), True, [[[]]],
]  # fmt: skip
"""What a value of a JSON file is replaced by."""


def time_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what `bench` times once."""

    def race(engines: list[EngineRef], inputs: list[Arrays], **_: object) -> list[Timing]:
        for engine, feeds in zip(engines, inputs, strict=True):
            with Worker(engine) as worker:
                worker.run(feeds)
        return [Timing(1, 1, 1, 1, 1)] * len(engines)

    monkeypatch.setattr("planish.optimizer.driver.bench.time_against_first", race)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    time_nothing(monkeypatch)


KINDS = {
    "classifier": Species("bert", "text-classification"),
    "tagger": Species("bert", "token-classification"),
    "writer": Species("gpt2", "text-generation"),
}


Outputs = Callable[[str], Path]


def outputs_in(folder: Path) -> Outputs:
    """Kind -> an output of it, built once."""

    def make(kind: str) -> Path:
        if not (folder / kind).is_dir():
            optimize(with_tokenizer(build(KINDS[kind], folder / f"{kind}-checkpoint")), folder / kind, clock=all_equal)
        return folder / kind

    return make


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return outputs_in(tmp_path_factory.mktemp("outputs"))


def commands(out: Path) -> Iterator[tuple[object, ...]]:
    yield "verify", out
    yield "run", out, "--text", "w1 w2", "--json"
    yield "bench", out, "--shape", "batch=1,sequence=4", "--json", "-"
    yield "bisect", out, "--pipeline", "remove-unused-nodes"
    yield "diff", out / "onnxruntime" / "model.onnx", out / "onnxruntime" / "model.onnx"
    yield "explain", out


def check(out: Path, *names: str) -> set[int]:
    """Run the commands over an output; the exit codes, all of them documented and none a bug."""
    codes = set()
    for command in commands(out):
        if not names or command[0] in names:
            code, said = run(*command)
            assert code in (DONE, FAILED, BAD_INPUT, ROOM), f"{command}: {code}, {said}"
            assert "Traceback" not in said
            assert len(said.splitlines()) <= 3, said
            codes.add(code)
    return codes


def places(value: Any, trail: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*trail, key)
        yield from places(inner, (*trail, key))


def replaced(value: Any, trail: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another at one place; without it if that is `...`."""
    value = copy.deepcopy(value)
    *way, last = trail
    parent = value
    for key in way:
        parent = parent[key]
    if new is ...:
        del parent[last]
    else:
        parent[last] = new
    return value


def mutations(value: Any, seed: int, count: int) -> Iterator[Any]:
    """Values with one thing changed, drawn by the seed."""
    generator = random.Random(seed)
    known = list(places(value))
    for _ in range(count):
        yield replaced(value, generator.choice(known), generator.choice([..., *HOSTILE]))


@pytest.fixture
def out(request: pytest.FixtureRequest, outputs: Outputs, tmp_path: Path) -> Path:
    """A copy of an output, to be changed."""
    return Path(shutil.copytree(outputs(getattr(request, "param", "classifier")), tmp_path / "out"))


JSON_FILES = [
    "planish.json",
    "sites.json",
    "onnxruntime/config.json",
    "onnxruntime/tokenizer_config.json",
    "onnxruntime/tokenizer.json",
]


def forged(out: Path, *files: str) -> None:
    """Let the manifest say that these files are as they were written."""
    manifest = Manifest.read(out)
    digests = {file: str(digest_of(out / file)) for file in files}
    manifest.model_copy(update={"files": {**manifest.files, **digests}}).write(out)


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("file", [*JSON_FILES, "onnxruntime/generation_config.json"])
@pytest.mark.parametrize("out", KINDS, indirect=True)
def test_changed_json_files(out: Path, file: str, seed: int) -> None:
    path = out / file
    if not path.is_file():
        pytest.skip("this kind has no such file")
    manifest = (out / "planish.json").read_text()
    for changed in mutations(json.loads(path.read_text()), seed, 8):
        path.write_text(json.dumps(changed))
        if file != "planish.json":
            (out / "planish.json").write_text(manifest)
            forged(out, file)
        check(out)


MANIFESTS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "an element type that there is not": (("signatures", "model", "inputs", 0, "dtype"), "EVIL"),
    "no element type": (("signatures", "model", "inputs", 0, "dtype"), "UNDEFINED"),
    "a negative size": (("signatures", "model", "inputs", 0, "shape"), [2, -5]),
    "an axis that is not there": (("signatures", "model", "axes"), {}),
    "a maximum below the minimum": (("signatures", "model", "axes", "batch"), {"minimum": 4, "maximum": -1}),
    "no components": (("signatures",), {}),
    "no inputs": (("signatures", "model", "inputs"), []),
    "no targets": (("targets",), {}),
    "no budgets": (("targets", "onnxruntime", "budgets"), {}),
    "a budget that cannot be read": (("targets", "onnxruntime", "budgets", "model"), "max_rel"),
    "a target that there is not": (("targets", "onnxruntime", "target"), "onnxruntime{evil=1}"),
    "a target of another name": (("targets", "onnxruntime", "target"), "openvino"),
    "noise of another component": (("reference", "noise"), {"other": {"logits": 1.0}}),
    "no noise of the output": (("reference", "noise", "model"), {"others": 1.0}),
    "a file outside": (("files", "../other"), "0"),
    "an absolute file": (("files", "/etc/passwd"), "0"),
    "a file with a long name": (("files", "onnxruntime/" + "x" * 5000), "0"),
    "a file with a zero": (("files", "onnxruntime/\0"), "0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_checked_where_they_are_read(out: Path, name: str) -> None:
    path = out / "planish.json"
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), *MANIFESTS[name])))
    with pytest.raises(BadInput) as error:
        manifest = Manifest.read(out)
        manifest.backend("onnxruntime")
        manifest.targets["onnxruntime"].budget("model")
        References.load(out / "reference", manifest.reference.noise, "")
    assert str(error.value.where).endswith(("planish.json", "reference"))


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize("name", MANIFESTS)
def test_commands_refuse_such_manifests(out: Path, name: str) -> None:
    path = out / "planish.json"
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), *MANIFESTS[name])))
    assert check(out, "verify") <= {BAD_INPUT, FAILED}
    check(out)


@pytest.mark.slow
def test_engines_are_looked_for_inside_of_the_output(out: Path, outputs: Outputs) -> None:
    path = out / "planish.json"
    manifest = json.loads(path.read_text())
    for name in ("../classifier/onnxruntime", str(outputs("classifier") / "onnxruntime"), "x" * 5000, "a\0b", ".."):
        record = {**manifest["targets"]["onnxruntime"], "target": name}
        path.write_text(json.dumps({**manifest, "targets": {name: record}}))
        assert check(out, "verify", "run", "bench", "bisect", "explain") == {BAD_INPUT}
    path.write_text(json.dumps(manifest))
    shutil.rmtree(out / "onnxruntime")
    (out / "onnxruntime").symlink_to(outputs("classifier") / "onnxruntime")
    code, said = run("run", out, "--text", "w1")
    assert (code, "link to a place outside" in said) == (BAD_INPUT, True)


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize(
    "task", ["token-classification", "feature-extraction", "question-answering", "multiple-choice", "fill-mask"]
)
def test_a_task_that_the_engine_does_not_serve(out: Path, task: str) -> None:
    path = out / "planish.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": task}))
    assert check(out, "run") == {BAD_INPUT}
    check(out)


def keys(change: Callable[[str], str]) -> Callable[[dict[str, np.ndarray]], dict[str, Any]]:
    return lambda arrays: {change(name): array for name, array in arrays.items()}


REFERENCES: dict[str, Callable[[dict[str, np.ndarray]], dict[str, Any]]] = {
    "names without a number": keys(lambda name: name.partition("/")[2]),
    "names that are no numbers": keys(lambda name: f"x{name}"),
    "numbers of 5,000 digits": keys(lambda name: "1" * 5000 + name),
    "no cases": lambda _: {},
    "one case less": lambda arrays: {name: array for name, array in arrays.items() if not name.startswith("0/")},
    "an output less": lambda arrays: dict(list(arrays.items())[1:]),
    "another shape": lambda arrays: {name: array[..., :1] for name, array in arrays.items()},
    "another type": lambda arrays: {name: array.astype(np.int8) for name, array in arrays.items()},
    "a number": lambda arrays: {name: np.array(1.0) for name in arrays},
    "nothing": lambda arrays: {name: array[:0] for name, array in arrays.items()},
}


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
@pytest.mark.parametrize("name", REFERENCES)
def test_changed_references(out: Path, kind: str, name: str) -> None:
    file = f"reference/{kind}.safetensors"
    save_file({key: np.ascontiguousarray(a) for key, a in REFERENCES[name](load_file(out / file)).items()}, out / file)
    assert check(out, "verify") == {FAILED}  # by the hash
    forged(out, file)
    assert check(out, "verify") <= {FAILED, BAD_INPUT} | ({DONE} if name == "another type" else set())  # ids in int8
    check(out, "bisect")


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F16"])
def test_references_of_another_element_type(out: Path, kind: str) -> None:
    file = out / "reference" / "outputs.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for entry in header.values():
        size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // (1 if kind.startswith("F8") else 2)
        entry |= {"dtype": kind, "shape": [size]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    forged(out, "reference/outputs.safetensors")
    assert check(out, "verify") <= {FAILED, BAD_INPUT}


def misshapen(array: np.ndarray) -> list[np.ndarray]:
    return [array[..., None], array.reshape(-1)[:1], array.astype(np.float64)]


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize("out", ["writer"], indirect=True)
def test_changed_continuations(out: Path) -> None:
    file = "reference/continuations.safetensors"
    arrays: dict[str, np.ndarray] = load_file(out / file)
    for part in ("swap", "start", "tokens", "scores", "prompt:input_ids"):
        for index in range(3):
            changed = {
                name: misshapen(array)[index] if name.endswith(part) else array for name, array in arrays.items()
            }
            save_file({name: np.ascontiguousarray(array) for name, array in changed.items()}, out / file)
            forged(out, file)
            assert check(out, "verify") <= {FAILED, BAD_INPUT, DONE}
        save_file({name: array for name, array in arrays.items() if not name.endswith(part)}, out / file)
        forged(out, file)
        assert check(out, "verify") == {BAD_INPUT}


@pytest.mark.slow
def test_labels_and_limits_of_other_types(out: Path) -> None:
    Manifest.read(out).model_copy(update={"tokenizer": None}).write(out)
    config, tokenizer = (out / "onnxruntime" / name for name in ("config.json", "tokenizer_config.json"))
    labels: object
    for labels in (None, [], "x", {"0": None}):
        config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": labels}))
        assert check(out, "run") <= {DONE, BAD_INPUT}
    config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": {"0": "\ud800"}}))
    assert check(out, "run") == {BAD_INPUT}
    config.write_text("{}")
    for limit in ([512], "512", -1, True):
        tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": limit}))
        assert check(out, "run") == {BAD_INPUT}


@pytest.mark.slow
def test_a_tokenizer_without_the_unknown_word(out: Path) -> None:
    path = out / "onnxruntime" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["model"]["vocab"]["[UNK]"]
    tokenizer["added_tokens"] = []
    path.write_text(json.dumps(tokenizer))
    code, said = run("run", out, "--text", "unheard of")
    assert (code, "its tokenizer cannot" in said) == (BAD_INPUT, True), said


def test_no_cases_are_written_and_read(tmp_path: Path) -> None:
    save_cases([], tmp_path / "prompts.safetensors")  # of a program that writes nothing
    assert load_cases(tmp_path / "prompts.safetensors") == []


def test_infinite_figures_are_read_again(outputs: Outputs, tmp_path: Path) -> None:
    manifest = Manifest.read(outputs("classifier"))
    record = manifest.targets["onnxruntime"].model_copy(update={"comparison": {"logits": {"max_rel": float("inf")}}})
    manifest.model_copy(update={"targets": {"onnxruntime": record}}).write(tmp_path)
    assert Manifest.read(tmp_path).targets["onnxruntime"].comparison == {"logits": {"max_rel": float("inf")}}
