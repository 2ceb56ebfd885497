"""Files beside the output: what cannot be written is refused before anything is lowered, and OUT stays as it was."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from planish.optimizer import optimize
from planish.optimizer.driver.files import demand_writable
from planish.optimizer.errors import BadInput, OutOfResources, UsageError
from tests.optimizer.cli.test_bad_input import BAD_INPUT, USAGE, refused

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[rows,4] x) => (float[rows,4] y) { i = Identity (x)  y = Relu (i) }"""
UNCHECKED: dict[str, Any] = {"pipeline": "eliminate-identities", "reference": "none"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An ONNX file, and beside it a file and a folder."""
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    (tmp_path / "afile").write_text("mine")
    (tmp_path / "afolder").mkdir()
    return tmp_path / "model.onnx"


@pytest.fixture
def _nothing_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: object, **__: object) -> None:
        raise AssertionError("nothing shall be lowered")

    monkeypatch.setattr("planish.optimizer.driver.optimize.lower", lower)


def content(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.usefixtures("_nothing_lowered")
@pytest.mark.parametrize("option", ["--lock", "--depfile", "--profile"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("afile/x", "this cannot be written: {}/afile is not a folder; choose another place"),
        ("afile/new/x", "this cannot be written: {}/afile is not a folder; choose another place"),
        ("afolder", "this is a folder; name the file that shall be written"),
    ],
)
def test_places_that_take_no_file(option: str, name: str, message: str, source: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    place = tmp_path / name
    arguments = [] if option == "--profile" else ["--pipeline", "eliminate-identities"]
    refused(
        BAD_INPUT,
        f"{option} {place}: {message.format(tmp_path)}",
        *("optimize", source, "-o", tmp_path / "out", *arguments, option, place),
    )
    assert content(tmp_path) == before


@pytest.mark.usefixtures("_nothing_lowered")
@pytest.mark.parametrize("option", ["lock", "depfile"])
def test_what_permissions_do_not_tell_is_tried_out(option: str, source: Path, tmp_path: Path) -> None:
    """The hidden files of a build have longer names than the file itself: the claim of the place finds that out."""
    before = content(tmp_path)
    with pytest.raises(BadInput, match=r"this cannot be written \(File name too long\)"):
        optimize(source, tmp_path / "out", **UNCHECKED | {option: tmp_path / "new" / ("x" * 250)})
    assert content(tmp_path) == before


def test_a_file_system_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_text("")

    def failing(number: int) -> None:
        def temporary(**_: object) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path))

        monkeypatch.setattr(tempfile, "TemporaryFile", temporary)

    failing(errno.EROFS)
    with pytest.raises(BadInput, match=rf"--lock x: this cannot be written: {tmp_path} takes no files \(Read-only"):
        demand_writable(tmp_path / "new" / "x", "--lock x", replaced=False)
    with pytest.raises(BadInput, match="takes no files"):
        demand_writable(tmp_path / "old", "--depfile old", replaced=True)
    demand_writable(tmp_path / "old", "--lock old", replaced=False)  # it is only read
    failing(errno.ENOSPC)
    with pytest.raises(OutOfResources, match="there is no room"):
        demand_writable(tmp_path / "x", "--lock x", replaced=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(source: Path, tmp_path: Path) -> None:
    (tmp_path / "afolder").chmod(0o500)
    refused(
        BAD_INPUT,
        f"{tmp_path / 'afolder'} takes no files (Permission denied)",
        *("optimize", source, "-o", tmp_path / "out", "--lock", tmp_path / "afolder" / "m.lock"),
    )


@pytest.mark.usefixtures("_nothing_lowered")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "p", "--lock", "p"], "--lock {}/p: this would be written over --profile {}/p"),
        (["--profile", "p", "--depfile", "afolder/../p"], "this would be written over --profile {}/p"),
        (["--lock", "p", "--depfile", "p"], "--depfile {}/p: this would be written over --lock {}/p"),
        (["--lock", "p", "--depfile", "p/d"], "--lock {}/p: {}/p/d cannot lie below this, which is a file"),
        (["--lock", "out/m.lock"], "this lies inside the output folder"),
        (["--depfile", "out/d"], "this lies inside the output folder"),
        (["--depfile", "model.onnx"], "this would be written over source {}/model.onnx"),
    ],
)
def test_files_that_would_replace_each_other(arguments: list[str], message: str, source: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    given = [text if text.startswith("--") else tmp_path / text for text in arguments]
    said = message.replace("{}", str(tmp_path))
    refused(USAGE, said, "optimize", source, "-o", tmp_path / "out", *given)
    assert content(tmp_path) == before


def test_an_output_below_a_file_that_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="p/out cannot lie below this, which is a file"):
        optimize(source, tmp_path / "p" / "out", lock=tmp_path / "p", **UNCHECKED)
    assert not (tmp_path / "p").exists()


def test_a_failure_in_the_last_step_leaves_the_output_as_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize(source, tmp_path / "out", **UNCHECKED)
    before = content(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("planish.optimizer.driver.optimize.shutil.copyfile", full)
    with pytest.raises(OutOfResources):
        optimize(source, tmp_path / "out", lock=tmp_path / "new" / "m.lock", depfile=tmp_path / "d", **UNCHECKED)
    assert content(tmp_path) == before


@pytest.mark.parametrize(("name", "message"), [("a;b.onnx", "a depfile cannot name"), ("a=b.onnx", "that has '='")])
def test_names_that_no_depfile_can_have_are_found_before_the_build(
    name: str, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("nothing shall be run")

    monkeypatch.setattr("planish.optimizer.driver.optimize.ask_original", ask)
    source.rename(tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(UsageError, match=message):
        optimize(tmp_path / name, tmp_path / "out", depfile=tmp_path / "d", **UNCHECKED)
    assert content(tmp_path) == before


def test_a_depfile_that_is_weights_of_the_source(source: Path, tmp_path: Path) -> None:
    """Which files belong to a source is known when it was lowered."""
    (tmp_path / "config.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(UsageError, match="this would be written over"):
        optimize(source, tmp_path / "out", depfile=tmp_path / "config.json", **UNCHECKED)
    assert content(tmp_path) == before


def test_lock_and_depfile_are_written_behind_the_output(source: Path, tmp_path: Path) -> None:
    lock, depfile = tmp_path / "new" / "m.lock", tmp_path / "new" / "er" / "out.d"
    optimize(source, tmp_path / "out", lock=lock, depfile=depfile, **UNCHECKED)
    assert lock.read_bytes() == (tmp_path / "out" / "planish.lock").read_bytes()
    assert {str(source), str(lock)} <= set(depfile.read_text().split())
    assert lock.stat().st_mtime_ns <= (tmp_path / "out" / "planish.json").stat().st_mtime_ns
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []
