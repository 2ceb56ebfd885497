"""What applications read of a file survives `opt` and `optimize`; what exporters wrote of their machine does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest

from planish.optimizer import optimize
from tests.optimizer.cli.test_bad_input import run

NAMES = "{0: 'person', 1: 'bicycle'}"


def annotate(item: object, **entries: str) -> None:
    for key, value in entries.items():
        item.metadata_props.add(key=key, value=value)  # type: ignore[attr-defined]


def written(folder: Path, opset: int) -> Path:
    """A file that has all of it, with work for passes: identities at its end, shape arithmetic, constants to fold."""
    inputs = [
        oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4], doc_string=f"{name} in metres")
        for name in ("second", "first")
    ]
    outputs = [
        oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "classes"], doc_string=f"{name} in volts")
        for name in ("scores", "again")
    ]
    nodes = [
        oh.make_node("MatMul", ["second", "w"], ["product"], name="product", doc_string="the head"),
        oh.make_node("Identity", ["product"], ["same"], name="same"),
        oh.make_node("Add", ["same", "b"], ["sum"], name="sum", doc_string='File "/home/bob/model.py", line 7, in forward'),
        oh.make_node("Identity", ["sum"], ["scores"], name="out"),
        oh.make_node("Add", ["first", "first"], ["double"], name="double"),
        oh.make_node("Dropout", ["double"], ["again"], name="drop"),
    ]  # fmt: skip
    weights = [nh.from_array(np.eye(4, dtype=np.float32), "w"), nh.from_array(np.ones(4, np.float32), "b")]
    graph = oh.make_graph(nodes, "detector", inputs, outputs, weights, doc_string="finds things")
    model = oh.make_model(
        graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10, producer_name="ultralytics",
        doc_string="trained on COCO", domain="vision", model_version=7,
    )  # fmt: skip
    annotate(model, names=NAMES, stride="32", **{"pkg.torch.export.graph": "/home/bob/x.py"})
    annotate(model.graph.node[0], layer="head", **{"pkg.torch.onnx.stack_trace": "/home/bob/model.py"})
    annotate(model.graph, author="bob")
    annotate(model.graph.output[0], unit="volt")
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def facts(model: onnx.ModelProto) -> dict[str, object]:
    def notes(item: onnx.ModelProto | onnx.GraphProto | onnx.NodeProto | onnx.ValueInfoProto) -> object:
        return item.doc_string, {entry.key: entry.value for entry in item.metadata_props}

    def shape(value: onnx.ValueInfoProto) -> list[object]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    border = [(value.name, shape(value), notes(value)) for value in (*model.graph.input, *model.graph.output)]
    head = next(node for node in model.graph.node if node.output[0] == "product" or node.name == "product")
    return {
        "model": (notes(model), model.domain, model.model_version),
        "graph": (model.graph.name, notes(model.graph)),
        "border": border,
        "head": notes(head),
    }


def expected() -> dict[str, object]:
    inputs: list[object] = [(name, ["batch", 4], (f"{name} in metres", {})) for name in ("second", "first")]
    outputs = [
        ("scores", ["batch", "classes"], ("scores in volts", {"unit": "volt"})),
        ("again", ["batch", "classes"], ("again in volts", {})),
    ]
    return {
        "model": (("trained on COCO", {"names": NAMES, "stride": "32"}), "vision", 7),
        "graph": ("detector", ("finds things", {"author": "bob"})),
        "border": inputs + outputs,
        "head": ("the head", {"layer": "head"}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("opset", [23, 20, 13])
@pytest.mark.parametrize("command", ["opt", "optimize"])
def test_what_applications_read_survives(command: str, opset: int, tmp_path: Path) -> None:
    source = written(tmp_path, opset)
    if command == "opt":
        out = tmp_path / "out.onnx"
        assert (
            run("opt", source, "-o", out, "--pipeline", "fold-constants,eliminate-identities,simplify-shapes")[0] == 0
        )
    else:
        optimize(source, tmp_path / "out", pipeline="fold-constants,eliminate-identities", reference="none")
        out = tmp_path / "out" / "onnxruntime" / "model.onnx"
    model = onnx.load(out)
    found = facts(model)
    for key, wanted in expected().items():
        assert str(found[key]).replace("'classes'", "4") == str(wanted).replace("'classes'", "4"), key
    assert b"bob/" not in out.read_bytes()
