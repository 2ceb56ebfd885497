"""Outputs and scratch folders that cannot be made, or belong to others."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from planish.optimizer.errors import BadInput, OutOfResources
from planish.optimizer.system import scratch
from planish.optimizer.system.scratch import claimed, scratch_file, scratch_folder, sweep
from planish.optimizer.system.staging import (
    staged_file,
    staged_folder,
)
from tests.optimizer.system.test_staging import Staged, build


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(BadInput, match="TMPDIR: no folder for temporary files"), scratch_folder():
        pass
    with pytest.raises(BadInput, match="TMPDIR: no folder for temporary files"):
        scratch_file()


def test_an_unreadable_source_is_not_called_an_unwritable_output(tmp_path: Path) -> None:
    source = tmp_path / "ckpt" / "config.json"
    with (
        pytest.raises(BadInput, match=rf"{source}: this cannot be used \(Permission denied\)"),
        staged_folder(tmp_path / "out"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))
    with (
        pytest.raises(BadInput, match=rf"{tmp_path / 'out'}: this cannot be written"),
        staged_folder(tmp_path / "out") as folder,
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "model.onnx"))
    with pytest.raises(OutOfResources, match="gives this process no more"), staged_folder(tmp_path / "out"):
        raise OSError(errno.EMFILE, "Too many open files", str(source))


def test_a_name_that_is_too_long_and_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        build(Path("/".join([str(tmp_path), *["a" * 200] * 20])))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BadInput, match="cannot be written"):
        build(Path("out"))


@pytest.mark.parametrize("name", ["a" * 250, "a" * 300, "x/" + "a" * 300, "a" * 300 + "/x"])
@pytest.mark.parametrize("staged", [staged_folder, staged_file])
def test_an_output_that_is_refused_leaves_no_folder_above_it(name: str, staged: Staged, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written"), staged(tmp_path / "new" / "er" / name):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("staged", [staged_folder, staged_file])
def test_a_build_that_fails_leaves_no_folder_above_it(staged: Staged, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="no good"), staged(tmp_path / "there" / "new" / "er" / "out"):
        raise BadInput("no good")
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(BadInput, match="no good"), staged(tmp_path / "new" / "er" / "out"):
        (tmp_path / "new" / "other").touch()  # somebody else's
        raise BadInput("no good")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_a_link_to_a_folder_is_called_a_link(tmp_path: Path) -> None:
    build(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for name in ("link", "nowhere"):
        with pytest.raises(BadInput, match="this is a link, which is neither followed nor replaced"):
            build(tmp_path / name)
    with pytest.raises(BadInput, match="this is a link to a folder"), staged_file(tmp_path / "link"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="this exists and is not a folder"):
        build(tmp_path / "file")


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As the administrator, `--json /dev/stdout` would replace it for every process of the machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name, what in {"pipe": "this is a device, pipe or socket", "link": "this is a link to a device"}.items():
        with pytest.raises(BadInput, match=what), staged_file(tmp_path / name) as path:
            path.touch()
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


def _as_nobody(work: Callable[[], None]) -> str:
    """What ``work`` raises for a user who is not the administrator; skipped where we cannot become one."""
    if os.geteuid() != 0:
        pytest.skip("only the administrator can become somebody else")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            os.setresuid(65534, 65534, 65534)
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is goes to the other process
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def test_an_output_of_another_user_is_left_alone(tmp_path: Path) -> None:
    ours = [folder for folder in (tmp_path, *tmp_path.parents) if "pytest-" in folder.name or "popen-" in folder.name]
    for folder in (tmp_path, *ours):  # pytest lets nobody else in
        folder.chmod(0o755)
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o777)
    build(place / "out", "theirs")
    said = _as_nobody(lambda: build(place / "out", "ours"))
    assert "BadInput" in said
    assert "this user may not write there" in said
    assert (place / "out/onnxruntime/model.onnx").read_text() == "theirs"
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_sweep_takes_only_what_is_abandoned(tmp_path: Path) -> None:
    with claimed(tmp_path, scratch.PREFIX) as claim:
        sweep(tmp_path, scratch.PREFIX)
        assert claim.folder.is_dir()
        assert claim.lock.is_file()
    assert list(tmp_path.iterdir()) == []
