"""What changed between two models, kind by kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.diff import Change, compare_files, difference
from planish.optimizer.ir.onnx_io import load
from tests.conftest import Planish

BEFORE = """<ir_version: 10, opset_import: ["" : 22]>
g (float[N, 4] x) => (float[N, 4] r) <float[4] w = {1, 2, 3, 4}, float[4] b = {1, 1, 1, 1}, float[N, 4] y> {
  y = Identity (x)  z = Mul (y, w)  r = Add (z, b) }"""
AFTER = """<ir_version: 10, opset_import: ["" : 23]>
g (float[N, 4] x) => (float[N, 4] r, float[M, 4] s) <float[4] w = {1, 2, 3, 5}, float[2, 4] y> {
  y = Relu (x)  r = Mul (y, w)  s = Relu (r) }"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    for path, text in zip(paths, (BEFORE, AFTER), strict=True):
        path.parent.mkdir()
        onnx.save(onnx.parser.parse_model(text), path)
    return paths


def test_every_kind_of_change_is_told(files: tuple[Path, Path]) -> None:
    found = {(change.kind, change.name): change for change in difference(*map(load, files))}
    assert found.pop(("initializers", "w")).before != found.pop(("initializers", "b")).after
    assert set(found.values()) == {
        Change("size", "weight bytes", 32, 16),
        Change("opsets", "", 22, 23),
        Change("operators", "Identity", 1, None),
        Change("operators", "Add", 1, None),
        Change("operators", "Relu", None, 2),
        Change("outputs", "s", None, "FLOAT[M,4]"),
        Change("values", "y", "FLOAT[N,4]", "FLOAT[2,4]"),
    }


def test_weights_of_equal_shape_are_compared_by_what_they_hold(files: tuple[Path, Path]) -> None:
    changes = [change for change in difference(*map(load, files)) if change.name == "w"]
    assert [str(c.before)[:24] for c in changes] == ["FLOAT[4], 16 bytes, SHA-"]
    assert difference(load(files[0]), load(files[0])) == []


def test_weights_in_other_files_are_read(files: tuple[Path, Path]) -> None:
    proto = onnx.load(files[0])
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(4000, dtype=np.float32), "far"))
    proto.graph.node.append(onnx.helper.make_node("Identity", ["far"], ["unread"]))
    for path in files:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        onnx.save(copy, path, save_as_external_data=True, location="model.onnx.data")
    assert difference(*map(load, files)) == []


@pytest.mark.slow
def test_folders_are_compared_by_name(files: tuple[Path, Path], planish: Planish) -> None:
    one, other = (path.parent for path in files)
    assert list(compare_files(one, other)) == ["model.onnx"]
    done = planish("diff", one, other, "--json")
    assert done.returncode == 0, done.stderr
    assert {change["kind"] for change in json.loads(done.stdout)["model.onnx"]} >= {"operators", "outputs"}
    assert "nothing differs" in planish("diff", one, one).stdout


def test_what_cannot_be_compared(files: tuple[Path, Path], tmp_path: Path, command: Planish) -> None:
    with pytest.raises(BadInput, match=r"there is no \.onnx file in this folder"):
        (tmp_path / "empty").mkdir()
        compare_files(tmp_path / "empty", files[0])
    onnx.save(onnx.load(files[0]), files[0].parent / "encoder.onnx")
    done = command("diff", files[0].parent, files[1].parent)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert command("diff", tmp_path / "absent.onnx", files[0]).returncode == 3
