"""Backends are found by what they say of themselves, those of our own distribution first."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest

from planish.backends import BACKENDS
from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer.errors import BadInput
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.system.machine import library_versions


@pytest.fixture
def with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of another distribution, whose name comes before ours, and which claims what ours claim."""
    table = registry.table(registry.BACKENDS)
    another = registry.Entry(registry.BACKENDS, "another", f"{__name__}:Another", "another-distribution")
    monkeypatch.setattr(registry, "table", lambda group: {"another": another, **table})


@dataclass(frozen=True)
class Another(OnnxRuntime):
    """A backend with another name."""

    name: ClassVar[str] = "another"


@pytest.mark.usefixtures("with_another")
def test_our_own_backends_come_first(tmp_path: Path) -> None:
    assert [cls.name for cls in registry.backends()] == [*sorted(BACKENDS), "another"]
    (tmp_path / "model.onnx").touch()
    assert registry.target_of(tmp_path) == registry.target_of(tmp_path / "model.onnx") == "onnxruntime"


def test_graphs_in_memory_run_on_what_can_load_them() -> None:
    assert [cls.name for cls in registry.backends() if cls.interprets()] == ["onnxruntime"]
    assert str(registry.interpreter()) == "onnxruntime"
    with pytest.raises(BadInput, match="target openvino cannot run a graph from memory"):
        Backend.load(registry.backend("openvino"), None)  # type: ignore[arg-type]


def test_a_file_is_opened_by_what_claims_its_ending(tmp_path: Path) -> None:
    for name, target in (("a.onnx", "onnxruntime"), ("a.xml", "openvino")):
        (tmp_path / name).touch()
        assert registry.target_of(tmp_path / name) == target
    (tmp_path / "a.txt").touch()
    with pytest.raises(BadInput, match=r"this holds no engine; .*an engine folder, an \.onnx or an \.xml file"):
        registry.target_of(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="there is no such file or folder"):
        registry.target_of(tmp_path / "b.onnx")


def test_a_folder_is_opened_by_the_file_that_it_holds(tmp_path: Path) -> None:
    for name, file in (("tensorrt", "model.onnx"), ("other", "model.onnx"), ("ov", "openvino_decoder_model.xml")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    assert registry.target_of(tmp_path / "tensorrt") == "tensorrt"
    assert registry.target_of(tmp_path / "other") == "onnxruntime"
    assert registry.target_of(tmp_path / "ov") == "openvino"


def test_the_manifest_records_libraries_of_runtimes_among_the_others_by_name() -> None:
    versions = library_versions(registry.libraries())
    assert list(versions) == sorted(versions)
    assert {"numpy", "torch", "onnxruntime", "openvino"} <= versions.keys()
    assert versions["openvino"] == metadata.version("openvino")
    assert "openvino" not in library_versions([])
    assert library_versions(["no-such-distribution"]) == library_versions([])
