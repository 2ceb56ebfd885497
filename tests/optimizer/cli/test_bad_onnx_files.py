"""ONNX files that are broken, or hold what is not taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from tests.optimizer.cli.test_bad_input import BAD_INPUT, refused


def graph(*nodes: onnx.NodeProto, opset: int = 23, domain: str = "") -> onnx.ModelProto:
    """A model of one float input x [2,2], one output r, and a weight w."""
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    border = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, 64]) for name in "xr"]
    made = oh.make_graph(
        nodes or [oh.make_node("MatMul", ["x", "w"], ["r"], name="product")], "g", border[:1], border[1:], [weight]
    )
    imports = [oh.make_opsetid("", opset)] + ([oh.make_opsetid(domain, 1)] if domain else [])
    return oh.make_model(made, opset_imports=imports, ir_version=10)


def external(folder: Path, **entries: object) -> Path:
    """The model with its weight in `w.bin`, and lies about it."""
    model = graph()
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    stored = onnx.load_model(path, load_external_data=False)
    tensor = stored.graph.initializer[0]
    facts = {entry.key: entry.value for entry in tensor.external_data} | {
        key: str(value) for key, value in entries.items()
    }
    del tensor.external_data[:]
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(stored.SerializeToString())
    return path


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def link(folder: Path, how: Callable[[Path, Path], object]) -> Path:
    path = external(folder)
    (folder / "w.bin").rename(folder / "real.bin")
    how(folder / "real.bin", folder / "w.bin")
    return path


def cut(folder: Path, size: int) -> Path:
    path = external(folder)
    os.truncate(folder / "w.bin", size)
    return path


def raw(folder: Path, content: bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "nothing.onnx", "there is no such file"),
    "not ONNX": (lambda f: raw(f, b"PK\x03\x04" + os.urandom(999)), "this is not an ONNX model, or it is cut off"),
    "empty": (lambda f: raw(f, b""), "this file holds no graph"),
    "truncated": (lambda f: raw(f, graph().SerializeToString()[:-9000]), "this is not an ONNX model, or it is cut off"),
    "unknown operator": (
        lambda f: saved(f, graph(oh.make_node("Frobnicate", ["x"], ["r"]))),
        "no operator 'Frobnicate'",
    ),
    "unknown domain": (
        lambda f: saved(f, graph(oh.make_node("Relu", ["x"], ["r"], domain="com.example"), domain="com.example")),
        "of a domain that no target runs",
    ),
    "too old an opset": (lambda f: saved(f, graph(opset=9)), "it is written in opset 9; export it at opset 11"),
    "external data missing": (lambda f: external(f, location="gone.bin"), "external data 'gone.bin' is missing"),
    "external data above": (lambda f: external(f, location="../w.bin"), "lies outside the model's folder"),
    "external data absolute": (lambda f: external(f, location="/etc/passwd"), "lies outside the model's folder"),
    "external data short": (lambda f: cut(f, 100), "external data 'w.bin' is too short: 100 bytes"),
    "external data behind its end": (lambda f: external(f, offset=10**9), "is too short"),
    "external data of another length": (lambda f: external(f, length=12), "has 12 bytes at"),
    "external data at no number": (lambda f: external(f, offset="x"), "is not a number"),
    "external data a symbolic link": (lambda f: link(f, lambda a, b: b.symlink_to(a)), "is a symbolic link"),
    "external data a hard link": (lambda f: link(f, lambda a, b: b.hardlink_to(a)), "is a hard link"),
    "dangling input": (lambda f: saved(f, graph(oh.make_node("Relu", ["nowhere"], ["r"]))), "nowhere"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["optimize", "opt"])
def test_onnx_files(name: str, command: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    target = ["--pipeline", "fold-constants"] if command == "opt" else []
    refused(BAD_INPUT, message, command, make(folder), "-o", tmp_path / "out.onnx", *target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
