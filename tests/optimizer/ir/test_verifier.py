"""Every structural invariant: a graph that breaks it is found out, and the fault is shown under its node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer.errors import CheckFailed
from planish.optimizer.ir.verifier import faults_of, verify

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[2,3] x) => (float[2,4] r) <float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
  y = Relu (x)  z = Neg (y)  r = MatMul (z, w)
}"""


def model() -> ir.Model:
    return ir.from_onnx_text(GRAPH)


def node(graph: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in graph.graph if node.op_type == op_type)


def swap(graph: ir.Model) -> None:
    first, second = list(graph.graph)[:2]
    graph.graph.remove(first)
    graph.graph.insert_after(second, first)


def dangle(graph: ir.Model) -> None:
    node(graph, "Neg").replace_input_with(0, ir.Value(name="nowhere"))


def same_name(graph: ir.Model) -> None:
    node(graph, "Neg").outputs[0].name = "y"


def unknown_operator(graph: ir.Model) -> None:
    node(graph, "Relu").op_type = "Relux"


def too_new(graph: ir.Model) -> None:
    graph.opset_imports[""] = 15
    node(graph, "Relu").op_type = "Mish"


def foreign(graph: ir.Model) -> None:
    node(graph, "Relu").domain = "com.example"


def attribute(graph: ir.Model) -> None:
    node(graph, "Relu").attributes.add(ir.AttrFloat32("alpha", 1.0))


def missing_attribute(graph: ir.Model) -> None:
    node(graph, "Relu").op_type = "Cast"


def arity(graph: ir.Model) -> None:
    node(graph, "MatMul").op_type = "Relu"


def lying_weight(graph: ir.Model) -> None:
    graph.graph.initializers["w"].const_value = ir.tensor(np.zeros((3, 5), np.float32), name="w")


def wrong_type(graph: ir.Model) -> None:
    graph.graph.initializers["w"].const_value = ir.tensor(np.zeros((3, 4), np.int64), name="w")


def impossible_product(graph: ir.Model) -> None:
    weight = graph.graph.initializers["w"]
    weight.shape, weight.const_value = ir.Shape([5, 4]), ir.tensor(np.zeros((5, 4), np.float32), name="w")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, "used before it is defined"),
        (dangle, "input 0 ('nowhere') is used before it is defined, or is not of this graph"),
        (same_name, "the name 'y' is defined twice"),
        (unknown_operator, "ONNX has no operator Relux"),
        (too_new, "Mish does not exist at opset 15"),
        (foreign, "imports no opset of domain 'com.example'"),
        (attribute, "has no attribute 'alpha'"),
        (missing_attribute, "attribute 'to' is required"),
        (arity, "has 2 inputs, takes 1 to 1"),
        (lying_weight, "initializer 'w' has shape [3,5], its value says [3,4]"),
        (wrong_type, "initializer 'w' holds INT64, its value says FLOAT"),
        (impossible_product, "ncompatible dimensions"),
    ],
)
def test_damage_is_found(damage: Callable[[ir.Model], None], message: str) -> None:
    graph = model()
    assert faults_of(graph) == []
    damage(graph)
    assert any(message in str(fault) for fault in faults_of(graph)), [str(fault) for fault in faults_of(graph)]


def test_every_fault_is_shown_under_its_node() -> None:
    graph = model()
    unknown_operator(graph)
    dangle(graph)
    with pytest.raises(CheckFailed, match=r"\(and 1 more\)") as caught:
        verify(graph)
    lines = (caught.value.picture or "").splitlines()
    for op_type, message in (("Relux", "ONNX has no operator Relux"), ("Neg", "nowhere")):
        place = next(index for index, line in enumerate(lines) if f"::{op_type}(" in line)
        assert lines[place + 1].startswith("  ^ ")
        assert message in lines[place + 1]


def test_a_subgraph_may_read_what_is_defined_before_it() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]> g (bool c, float[2] x) => (float[2] r) {
      y = Exp (x)
      r = If (c) <
        then_branch = a () => (float[2] t) { t = Relu (y) }, else_branch = b () => (float[2] e) { e = Neg (x) }
      >
    }"""
    graph = ir.from_onnx_text(text)
    assert faults_of(graph) == []
    branch = node(graph, "If").attributes["then_branch"].as_graph()
    branch[0].replace_input_with(0, ir.Value(name="nowhere"))
    assert "nowhere" in str(faults_of(graph)[0])
