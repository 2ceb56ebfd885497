"""An output of the command line, for the tests of what lies in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from planish.optimizer.system.staging import MEASURED
from tests.conftest import Planish, once

SHAPE = ["--shape", "batch=1,sequence=16"]


@pytest.fixture(scope="session")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory, command: Planish) -> Path:
    """An output with two engines and its lock beside it, made by the command line."""

    def make(folder: Path) -> None:
        done = command(
            *("optimize", tiny, "-o", folder / "out", "--target", "onnxruntime", "--target", "openvino"),
            *("--preset", "fast", "--lock", folder / "tiny.lock", "--depfile", folder / "out.d", *SHAPE),
        )
        assert done.returncode == 0, done.stderr
        assert "report: " in done.stdout

    return once(tmp_path_factory, "built", make)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the measurements."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in MEASURED
    }
