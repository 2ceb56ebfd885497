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
from planish.optimizer.backend import Arrays
from planish.optimizer.generate import Decoding
from planish.optimizer.manifest import Manifest, digest_of
from planish.optimizer.measure import EngineRef, Timing
from planish.optimizer.reference import Continuation, thin
from tests.conftest import with_tokenizer
from tests.optimizer.test_bad_input import run
from tests.zoo import Species, build

DONE, FAILED, BAD_INPUT, ROOM = 0, 1, 3, 5
HOSTILE: list[Any] = [
    None, "", "EVIL", "__class__", "UNDEFINED", "../x", "a\0b", "x" * 5000, "\ud800", [], {}, [1], {"a": 1}, -1, 0, 3,
    2**70, 0.5, float("nan"), True, [[[]]],
]  # fmt: skip
"""What a value of a JSON file is replaced by."""


class Here:
    """Stands for `measure.Worker` in this process: the tests start no processes."""

    def __init__(self, engine: EngineRef, _: object = None) -> None:
        from planish.optimizer import registry

        backend = registry.backend(engine.target)
        self.engine: Any = (
            Decoding.of(backend, engine.path, engine.components) if engine.components else backend.open(engine.path)
        )

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: Arrays) -> Arrays:
        return thin(self.engine.run(inputs))

    def follow(self, wanted: Continuation) -> np.ndarray:
        from planish.optimizer.continuation import follow

        return follow(self.engine, wanted)

    def memory(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.optimizer.checking.Worker", Here)

    def race(engines: list[EngineRef], inputs: list[Arrays], **_: object) -> list[Timing]:
        for engine, feeds in zip(engines, inputs, strict=True):
            Here(engine).run(feeds)
        return [Timing(1, 1, 1, 1, 1)] * len(engines)

    monkeypatch.setattr("planish.optimizer.benching.race", race)


KINDS = {
    "classifier": Species("bert", "text-classification"),
    "tagger": Species("bert", "token-classification"),
    "writer": Species("gpt2", "text-generation"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An output of each kind."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planish.optimizer.building.race", lambda *_: [Timing(1, 1, 1, 1, 1)] * 2)
        for name, species in KINDS.items():
            optimize(with_tokenizer(build(species, folder / f"{name}-checkpoint")), folder / name)
    return {name: folder / name for name in KINDS}


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
def out(request: pytest.FixtureRequest, outputs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an output, to be changed."""
    return Path(shutil.copytree(outputs[getattr(request, "param", "classifier")], tmp_path / "out"))


JSON_FILES = [
    "planish.json",
    "sites.json",
    "onnxruntime/config.json",
    "onnxruntime/tokenizer_config.json",
    "onnxruntime/tokenizer.json",
]


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("file", [*JSON_FILES, "onnxruntime/generation_config.json"])
@pytest.mark.parametrize("out", KINDS, indirect=True)
def test_changed_json_files(out: Path, file: str, seed: int) -> None:
    path = out / file
    if not path.is_file():
        pytest.skip("this kind has no such file")
    manifest = Manifest.read(out)
    for changed in mutations(json.loads(path.read_text()), seed, 12):
        path.write_text(json.dumps(changed))
        if file != "planish.json":  # as if the hash had been forged as well
            digest = digest_of(path)
            assert digest is not None
            manifest.model_copy(update={"files": {**manifest.files, file: digest}}).write(out)
        check(out)
