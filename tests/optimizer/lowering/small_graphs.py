"""Graphs of a few nodes, written to files, and commands that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh

from tests.optimizer.cli.test_bad_input import run

RESOURCES = 5


HUGE = 1 << 33


FLOAT = onnx.TensorProto.FLOAT


def well(*arguments: object) -> None:
    """The command must end well, and only Planish may say something."""
    code, said = run(*arguments)
    assert code == 0, said
    assert all(line.startswith("planish: note: ") for line in said.splitlines()), said


def info(name: str, *shape: int | str, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return oh.make_tensor_value_info(name, kind, shape)


def model(
    *nodes: onnx.NodeProto,
    inputs: tuple[onnx.ValueInfoProto, ...] = (info("x", 2, 4),),
    outputs: tuple[onnx.ValueInfoProto, ...] = (info("y", 2, 4),),
    opset: int = 23,
    functions: tuple[onnx.FunctionProto, ...] = (),
    **constants: Any,
) -> onnx.ModelProto:
    held = [
        value if isinstance(value, onnx.TensorProto) else nh.from_array(np.asarray(value), name)
        for name, value in constants.items()
    ]
    graph = oh.make_graph(nodes or [oh.make_node("Relu", ["x"], ["y"])], "g", inputs, outputs, held)
    imports = [oh.make_opsetid("", opset), *(oh.make_opsetid("f", 1) for _ in functions)]
    return oh.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def node(operator: str, read: str, made: str = "y", **attributes: Any) -> onnx.NodeProto:
    return oh.make_node(operator, read.split(), made.split(), **attributes)


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path
