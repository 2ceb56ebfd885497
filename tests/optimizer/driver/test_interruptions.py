"""Builds that are killed, interrupted, or run out of room."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planish.optimizer import errors, optimize
from planish.optimizer.driver.verify import verify
from planish.optimizer.output.manifest import Manifest
from tests.optimizer.driver.conftest import SHAPE, digests

pytestmark = pytest.mark.slow


def start(tiny: Path, out: Path, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "planish.optimizer.cli", "optimize", str(tiny), "-o", str(out), *SHAPE]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("seconds", [0.5, *(pytest.param(late, marks=pytest.mark.breadth) for late in (6.0, 10.0))])
def test_a_killed_run_leaves_the_previous_output_whole(seconds: float, built: Path, tiny: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built / "out", tmp_path / "out")
    before = digests(out)
    process = start(tiny, out)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert digests(out) == before or Manifest.read(out).files  # killed before the exchange, or after it
    assert all(verdict.problems == () for verdict in verify(out).values())


def test_the_next_run_sweeps_up_after_a_killed_one(built: Path, tiny: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.abcdefgh.partial"
    left.mkdir()
    (tmp_path / ".out.abcdefgh.lock").touch()
    (left / "model.onnx").write_bytes(b"half")
    optimize(tiny, tmp_path / "out", shapes=[{"batch": 1, "sequence": 8}])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(how: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    def heed() -> None:
        """Where the tests run behind a shell's `&`, which lets what it starts ignore Ctrl-C, as well."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = start(tiny, tmp_path / "out", start_new_session=True, preexec_fn=heed)
    while not list(tmp_path.glob(".out.*.partial")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    # Python ends itself by SIGINT, which shells report as 130 too, if the interrupt came while it ran code from a text
    assert process.returncode in (130, -signal.SIGINT), said
    assert b"interrupted; nothing was written" in said
    assert b"Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of files: what writes beyond it gets the error that a full disk gives, with another number."""
    process = start(
        tiny, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    )
    _, said = process.communicate(timeout=300)
    assert process.returncode == 5, said
    assert b"there is no room to write" in said
    assert b"Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("65536 requested and 24864 written")]
)
def test_a_full_disk_is_known_however_it_is_told(
    error: OSError, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("planish.optimizer.ir.onnx_io.save", full)
    with pytest.raises(errors.OutOfResources, match="there is no room to write"):
        optimize(tiny, tmp_path / "out", shapes=[{"batch": 1, "sequence": 8}])
    assert list(tmp_path.iterdir()) == []
