"""A build is made again when, and only when, something that it has read is newer: with make and ninja themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import UsageError
from planish.optimizer.lowering import lower
from planish.optimizer.output.depfile import escaped, write_depfile
from planish.optimizer.output.lock import Lock
from tests.clocks import all_equal
from tests.conftest import Planish
from tests.optimizer.cli.test_bad_input import USAGE, refused

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[rows,4] x) => (float[rows,4] y) { i = Identity (x)  y = Relu (i) }"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An ONNX file with what travels along beside it."""
    folder = tmp_path / "my model"
    folder.mkdir()
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder / "model.onnx"


def up_to_date(folder: Path, target: str) -> bool:
    """What make itself says of a target whose prerequisites are all in `out.d`."""
    (folder / "Makefile").write_text(f"{target}:\n\t@false\ninclude out.d\n")
    done = subprocess.run(["make", "-q", target], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def listed(depfile: Path) -> list[Path]:
    words = depfile.read_text().partition(": ")[2].replace("\\\n", " ").replace("\\ ", "\0").split()
    return [Path(word.replace("\0", " ")) for word in words]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_finds_nothing_to_do_until_an_input_is_touched(
    source: Path, tmp_path: Path, command: Planish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text("print(1)")
    build = [
        *("optimize", source.relative_to(tmp_path), "-o", "out", "--pipeline", "eliminate-identities"),
        *("--lock", "m.lock", "--depfile", "out.d", "--evaluate", f"{sys.executable} judge.py"),
    ]
    assert command(*build).returncode == 0
    assert up_to_date(tmp_path, "out/planish.json")  # although the lock was written last
    inputs = listed(Path("out.d"))
    beside = {Path("my model") / name for name in ("model.onnx", "config.json", "tokenizer_config.json")}
    assert beside | {Path("my model/generation_config.json"), Path("m.lock"), Path("judge.py")} <= set(inputs)
    for path in inputs:
        before = path.stat()
        os.utime(path)
        assert not up_to_date(tmp_path, "out/planish.json"), path
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime("m.lock")
    assert command(*build).returncode == 0  # from the lock
    assert up_to_date(tmp_path, "out/planish.json")


@pytest.mark.breadth
@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not installed")
def test_ninja_finds_nothing_to_do_until_an_input_is_touched(source: Path, tmp_path: Path) -> None:
    build = f"'{source.relative_to(tmp_path)}' -o out --pipeline eliminate-identities --lock m.lock --depfile out.d"
    (tmp_path / "build.ninja").write_text(
        f"rule planish\n  command = {sys.executable} -m planish.optimizer.cli optimize {build}\n"
        "  depfile = out.d\n  deps = gcc\nbuild out/planish.json: planish\n"
    )

    def ninja(*options: str) -> str:
        done = subprocess.run(["ninja", *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "no work to do" not in ninja()
    assert "no work to do" in ninja()
    for path in (tmp_path / "m.lock", source, source.with_name("tokenizer_config.json")):
        before = path.stat()
        os.utime(path)
        assert "no work to do" not in ninja("-n"), path
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["a b", "a#b", "a$b", "a:b", "a=b", "[a]", "é", "a'b", "a&b"])
def test_make_reads_the_names_that_were_meant(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in map(Path, (name, "first", "out")):
        path.write_text("")
    write_depfile(Path("out.d"), Path("out"), [Path(name), Path("first")])
    assert up_to_date(tmp_path, "out")
    later = Path("out").stat().st_mtime + 10
    os.utime(name, (later, later))
    assert not up_to_date(tmp_path, "out")


@pytest.mark.parametrize("name", ["a;b", "a\\b", "a\nb", "a%b"])
def test_names_that_make_or_ninja_would_misread_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a depfile cannot name"):
        escaped(Path(name))
    refused(USAGE, "a depfile cannot name", "optimize", source, "-o", tmp_path / name, "--depfile", tmp_path / "d")
    assert not (tmp_path / name).exists()


_opened: list[str] | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.append(os.fspath(arguments[0]))


@pytest.mark.slow
def test_every_file_that_is_opened_is_among_the_inputs(tiny: Path, tmp_path: Path) -> None:
    global _opened  # noqa: PLW0603 - an audit hook stays for good: it hears only while this is a list
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (folder / "generation_config.json").write_text("{}")
    sys.addaudithook(_hear)
    _opened = []
    try:
        result = optimize(folder, tmp_path / "out", reference="none", calibration=["w1 w2"] * 3, pipeline="fuse-gelu")
        heard = _opened
    finally:
        _opened = None
    names = {Path(name).relative_to(folder).as_posix() for name in heard if name.startswith(f"{folder}/")}
    assert "tokenizer.json" in names
    assert names <= set(result.manifest.source.files)
    assert set(result.manifest.source.files) >= {"config.json", "model.safetensors", "generation_config.json"}


@pytest.mark.slow
def test_a_lock_fits_one_tokenizer_only(source: Path, tmp_path: Path) -> None:
    optimize(source, tmp_path / "out", pipeline="eliminate-identities", lock=tmp_path / "lock", clock=all_equal)
    assert "tokenizer_config.json" in Lock.read(tmp_path / "lock").source
    source.with_name("tokenizer_config.json").write_text('{"model_max_length": 3}')
    with pytest.raises(UsageError, match="made for another source"):
        optimize(source, tmp_path / "out", pipeline="eliminate-identities", lock=tmp_path / "lock", clock=all_equal)


def test_the_index_of_shards_is_an_input(tiny: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    table = {"weight_map": dict.fromkeys(load_file(folder / shard), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    files = lower(folder).program.provenance.files
    assert {"model.safetensors.index.json", shard} <= set(files)
