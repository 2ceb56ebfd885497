"""Backends are found by what they say of themselves, those of our own distribution first."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from planish.backends import BACKENDS
from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.system.machine import library_versions


@pytest.fixture
def with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of another distribution, whose name comes before ours, and which claims what ours claim."""
    entries = {**registry.table(registry.BACKENDS)}
    path = entries["onnxruntime"].path
    known = {"another": registry.Entry(path, "another-distribution"), **entries}
    monkeypatch.setattr(registry, "table", lambda group: known)


@pytest.mark.usefixtures("with_another")
def test_our_own_backends_come_first() -> None:
    assert [cls.name for cls in registry.backends()][:3] == sorted(BACKENDS)
    assert len(list(registry.backends())) == 4


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module_at_all:Other", "No module named 'no_such_module_at_all'"),
        ("planish.backends:Other", "planish.backends has no Other"),
    ],
)
def test_a_backend_of_others_that_does_not_import_is_named_before_anything_is_built(
    path: str, reason: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {group: {**registry.table(group)} for group in (registry.BACKENDS, registry.PASSES)}
    tables[registry.BACKENDS]["another"] = registry.Entry(path, "another-distribution")
    monkeypatch.setattr(registry, "table", tables.__getitem__)
    told: list[str] = []
    with pytest.raises(UsageError) as caught:
        optimize(tiny, tmp_path / "out", progress=lambda stage, *_: told.append(stage))
    assert str(caught.value) == (
        f"distribution another-distribution: {path} cannot be imported ({reason}); "
        "mend another-distribution, or uninstall it"
    )
    assert told == []


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
