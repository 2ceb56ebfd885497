"""Our own backends pass the checks that authors of others run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from planish.backends import BACKENDS
from planish.optimizer.interfaces import registry
from planish.optimizer.testing import CHECKS, KEEP, run_check

TARGETS = {
    "onnxruntime": KEEP,
    "onnxruntime{cache=int8}": ("max_rel<=2e-2",),
    "onnxruntime{weights=mapped threads=1}": KEEP,
    "openvino": KEEP,
    "tensorrt": KEEP,
}
FILES = {"__init__.py", "target.py", "emit.py", "engine.py", "presets.py", "counters.py"}
NOT_OPENED = {"tensorrt"}
"""Backends that only write, so that there is no engine to wrap."""


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("target", TARGETS)
def test_conformance(target: str, name: str) -> None:
    reason = run_check(name, registry.backend(target), TARGETS[target])
    if reason is not None:
        pytest.skip(reason)


def test_every_backend_of_ours_is_checked() -> None:
    assert {target.partition("{")[0] for target in TARGETS} == set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_folders_have_files_of_the_same_names(name: str) -> None:
    folder = Path(__file__).parents[2] / "backends" / name
    wanted = FILES - {"engine.py", "counters.py"} if name in NOT_OPENED else FILES
    assert {path.name for path in folder.glob("*.py")} == wanted


def test_the_frame_names_no_backend() -> None:
    """But for the target where none is named; text for people is no literal of its own."""
    places = [
        path.name
        for path in (Path(__file__).parents[2] / "optimizer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in set(BACKENDS)
    ]
    assert places == ["registry.py"]
