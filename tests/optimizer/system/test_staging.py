"""Outputs at the edges: what may be replaced, what killed runs leave, runs for one destination at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.system import staging
from planish.optimizer.system.scratch import COMMITTED, claimed, scratch_folder
from planish.optimizer.system.staging import (
    MANIFEST,
    MEASUREMENTS,
    demand_apart,
    demand_not_read,
    staged_file,
    staged_folder,
    sweep_up,
)

Staged = Callable[[Path], AbstractContextManager[Path]]


AWKWARD = ["out", "[a]", "*", "a?b", "two words", "ünïcode", ".hidden", "-o", "a\nb"]


def fill(folder: Path, text: str = "") -> None:
    """What makes a folder an output: a manifest that lists its files."""
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "model.onnx").write_text(text)
    (folder / MEASUREMENTS).write_text("{}")
    (folder / MANIFEST).write_text(json.dumps({"files": {"onnxruntime/model.onnx": "0"}}))


def build(out: Path, text: str = "") -> None:
    with staged_folder(out) as folder:
        fill(folder, text)


def in_a_process_that_dies(work: Callable[[], None]) -> None:
    """Run ``work`` in a fork that then ends like one that was killed: nothing is tidied up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("name", AWKWARD)
def test_the_next_run_sweeps_up_whatever_the_name(name: str, tmp_path: Path) -> None:
    def dies() -> None:
        with staged_folder(tmp_path / name) as folder:
            (folder / "half").write_text("half")
            os._exit(0)

    others = tmp_path / ".b.abcdefgh.partial"
    others.mkdir()
    in_a_process_that_dies(dies)
    assert len(list(tmp_path.iterdir())) == 3
    build(tmp_path / name, "new")
    assert sorted(tmp_path.iterdir()) == sorted([others, tmp_path / name])


@pytest.mark.parametrize("name", ["m.onnx", "[a].onnx", "*"])
def test_a_killed_run_for_a_file_is_swept_up(name: str, tmp_path: Path) -> None:
    def dies() -> None:
        with staged_file(tmp_path / name) as path:
            path.write_text("half")
            os._exit(0)

    in_a_process_that_dies(dies)
    assert len(list(tmp_path.iterdir())) == 2
    with staged_file(tmp_path / name) as path:
        path.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_living_run_builds_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as folder:
        fill(folder, "first")
        build(tmp_path / "out", "second")
        assert folder.is_dir()
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_and_names_like_ours_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    (tmp_path / ".out.abcdefgh.partial").symlink_to(elsewhere)
    (tmp_path / ".out.abcdefgh.lock").symlink_to(elsewhere / "precious")
    (tmp_path / ".out.ijklmnop.lock").touch()
    (tmp_path / ".out.ijklmnop.partial").symlink_to(elsewhere)
    (tmp_path / ".out.backup.old").mkdir()
    (tmp_path / ".out.20261128.old").mkdir()  # eight characters, but no lock of ours
    build(tmp_path / "out")
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    assert (tmp_path / ".out.backup.old").is_dir()
    assert (tmp_path / ".out.20261128.old").is_dir()


@pytest.mark.parametrize("strange", ["notes.txt", "onnxruntime/notes.txt", "ckpt/config.json", ".git/HEAD"])
def test_files_of_the_user_in_an_output_are_never_lost(strange: str, tmp_path: Path) -> None:
    build(tmp_path / "out", "old")
    (tmp_path / "out" / strange).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / strange).write_text("precious")
    with pytest.raises(BadInput, match=strange):
        build(tmp_path / "out", "new")
    assert (tmp_path / "out" / strange).read_text() == "precious"
    (tmp_path / "out" / strange).unlink()
    build(tmp_path / "out", "new")
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "new"


@pytest.mark.parametrize("exchanges", [True, False])
def test_files_that_come_while_we_build_are_not_lost(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    build(tmp_path / "out", "old")
    with pytest.raises(BadInput, match=r"notes\.txt"), staged_folder(tmp_path / "out") as folder:
        fill(folder, "new")
        (tmp_path / "out" / "notes.txt").write_text("precious")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_come_in_the_last_moment_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and the exchange: it is taken back."""
    build(tmp_path / "out", "old")
    exchange = staging._exchange

    def late(one: Path, other: Path) -> bool:
        if not (one / "notes.txt").exists():
            (other / "notes.txt").write_text("precious")
        return exchange(one, other)

    monkeypatch.setattr(staging, "_exchange", late)
    with pytest.raises(BadInput, match=r"notes\.txt"):
        build(tmp_path / "out", "new")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def add_a_file(out: Path) -> None:
    (out / "notes.txt").write_text("precious")


def replace_the_manifest_by_a_folder(out: Path) -> None:
    (out / MANIFEST).unlink()
    (out / MANIFEST).mkdir()


def replace_the_manifest_by_a_link_to_a_folder(out: Path) -> None:
    (out / MANIFEST).unlink()
    (out / MANIFEST).symlink_to("onnxruntime")


LATE = [add_a_file, replace_the_manifest_by_a_folder, replace_the_manifest_by_a_link_to_a_folder]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("late", LATE)
def test_what_comes_between_the_last_look_and_the_move_is_not_lost(
    late: Callable[[Path], None], exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out", "old")
    exchange, rename = staging._exchange, Path.rename
    done: list[bool] = []

    def put() -> None:
        if not done:
            done.append(True)
            late(tmp_path / "out")

    def exchanged(one: Path, other: Path) -> bool:
        put()
        return exchange(one, other)

    def renamed(path: Path, target: Path) -> Path:
        if path == tmp_path / "out":
            put()
        return rename(path, target)

    monkeypatch.setattr(staging, "_exchange", exchanged if exchanges else lambda *_: False)
    monkeypatch.setattr(Path, "rename", Path.rename if exchanges else renamed)
    with pytest.raises(BadInput):
        build(tmp_path / "out", "new")
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "old"
    assert late is not add_a_file or (tmp_path / "out" / "notes.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_get_its_name_back_is_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an exchange: a file comes in the last moment, and another run's output takes the name meanwhile."""
    build(tmp_path / "out", "old")
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        moved = path == tmp_path / "out"
        if moved:
            (path / "notes.txt").write_text("precious")
        found = rename(path, target)
        if moved:
            (tmp_path / "out").mkdir()
            fill(tmp_path / "out", "another run's")
        return found

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(BadInput, match=r"what was in it before is kept in .*out\.kept\.") as error:
        build(tmp_path / "out", "new")
    kept = Path(str(error.value).rpartition(" ")[2])
    assert (kept / "notes.txt").read_text() == "precious"
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "another run's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", kept.name]


def test_a_plan_that_an_output_built_itself_is_replaced(tmp_path: Path) -> None:
    build(tmp_path / "out")
    (tmp_path / "out/onnxruntime/model.plan").write_text("")
    build(tmp_path / "out", "new")
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "new"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 5}', "[" * 100_000])
def test_a_manifest_that_lists_nothing_protects_everything(text: str, tmp_path: Path) -> None:
    build(tmp_path / "out", "old")
    (tmp_path / "out" / MANIFEST).write_text(text)
    with pytest.raises(BadInput):
        build(tmp_path / "out", "new")
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "old"


def test_what_is_read_or_written_lies_outside(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "ckpt"
    source.mkdir()
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    for inside in (out, out / "ckpt", tmp_path / "ckpt" / ".." / "out" / "x", tmp_path / "link" / "x"):
        with pytest.raises(UsageError, match="lies inside the output folder"):
            demand_apart(out, {"source": inside}, {})
        with pytest.raises(UsageError, match="lies inside the output folder"):
            demand_apart(out, {}, {"--lock": inside})
    with pytest.raises(UsageError, match="lies inside this, which is only read"):
        demand_apart(source / "out", {"source": source}, {})
    with pytest.raises(UsageError, match=r"written over source .*m\.onnx"):
        demand_not_read({"source": tmp_path / "m.onnx"}, {"--depfile": tmp_path / "m.onnx"})
    demand_apart(out, {"source": source, "--adapter": None}, {"--lock": tmp_path / "out.lock"})
    demand_apart(tmp_path / ("a" * 2_000), {"source": source}, {})


def test_without_an_exchange_the_next_run_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames that stand for the exchange."""
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    build(tmp_path / "out", "old")
    rename = Path.rename

    def dies() -> None:
        def die(path: Path, target: Path) -> Path:
            if path.name.endswith(".partial"):
                os._exit(0)
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", die)
        build(tmp_path / "out", "new")

    in_a_process_that_dies(dies)
    assert not (tmp_path / "out").exists()
    sweep_up(tmp_path / "out", is_file=False)
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    build(tmp_path / "out", "new")
    assert (tmp_path / "out/onnxruntime/model.onnx").read_text() == "new"


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_graph_never_stands_beside_the_weights_of_another(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind so many of the two renames: the graph is missing, or it is that of the weights."""
    out = tmp_path / "m.onnx"

    def write(text: str) -> None:
        with staged_file(out) as path:
            path.write_text(text)
            path.with_name("m.onnx.data").write_text(text)

    write("old")
    replace = Path.replace
    done: list[Path] = []

    def dies() -> None:
        def move(path: Path, target: Path) -> Path:
            if len(done) == moves:
                os._exit(0)
            done.append(path)
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", move)
        write("new")

    in_a_process_that_dies(dies)
    assert not out.exists() or out.read_text() == out.with_name("m.onnx.data").read_text()
    sweep_up(out, is_file=True)
    assert out.read_text() == out.with_name("m.onnx.data").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_what_is_not_complete_is_never_moved(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("old")
    with claimed(tmp_path, ".m.onnx.") as claim:
        (claim.folder / "m.onnx").write_text("half")
        staging._commit(claim, out)
        assert out.read_text() == "old"
        (claim.folder / COMMITTED).touch()
        staging._commit(claim, out)
        assert out.read_text() == "half"


def _many(out: Path, until: float, name: str) -> None:
    while time.monotonic() < until:
        build(out, name)


@pytest.mark.slow
@pytest.mark.parametrize("exchanges", [True, False])
def test_runs_for_one_output_do_not_trip_over_each_other(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes stage and move for two seconds: each succeeds each time, and nothing stays behind."""
    monkeypatch.setattr(staging, "_settle", lambda _: None)  # waits for the disk
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    context = multiprocessing.get_context("fork")
    until = time.monotonic() + 2
    runs = [context.Process(target=_many, args=(tmp_path / "out", until, str(number))) for number in range(4)]
    for run in runs:
        run.start()
    while exchanges and time.monotonic() < until:  # an exchange leaves no moment without an output
        if (tmp_path / "out").exists():
            assert (tmp_path / "out" / MANIFEST).exists() or (tmp_path / "out" / MANIFEST).exists()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scratch_folders_of_killed_runs_are_swept_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def dies() -> None:
        with scratch_folder() as folder:
            (folder / "plain").write_text("as large as the model")
            os._exit(0)

    (tmp_path / "planish-notes.old").mkdir()  # a user's
    (tmp_path / "planish-bug-abc.txt").touch()
    in_a_process_that_dies(dies)
    assert len(list(tmp_path.glob("planish-????????.*"))) == 2
    with scratch_folder() as folder, scratch_folder() as other:
        assert folder.is_dir()
        assert other.is_dir()
        assert len(list(tmp_path.glob("planish-????????.*"))) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planish-bug-abc.txt", "planish-notes.old"]
