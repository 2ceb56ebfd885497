"""Graphs that nobody lowered: old IR versions, functions of another opset, operators that inference does not know."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from planish.optimizer import Pipeline, errors
from planish.optimizer.pipeline.instruments import VerifyEach

GELU = """{ root = Constant <value_float = 1.4142135> ()  one = Constant <value_float = 1.0> ()
  half = Constant <value_float = 0.5> ()
  a = Div (x, root)  b = Erf (a)  c = Add (b, one)  d = Mul (x, c)  r = Mul (d, half) }"""


def run(pipeline: str, text: str) -> ir.Model:
    return Pipeline.parse(pipeline).run(onnx.parser.parse_model(text), [VerifyEach()]).model


def test_constants_that_are_no_inputs_raise_the_ir_version() -> None:
    graph = "g (float[2] x) => (float[2] r) { a = Constant <value_floats = [1.0, 2.0]> ()  r = Add (x, a) }"
    model = run("fold-constants", f'<ir_version: 3, opset_import: ["" : 12]> {graph}')
    assert list(model.graph.initializers) == ["a"]
    assert model.ir_version == 4
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize(("outer", "inner"), [(20, 17), (17, 20)])
def test_a_function_stays_as_it_is_whatever_its_opset(outer: int, inner: int) -> None:
    header = (
        f'<ir_version: 10, opset_import: ["" : {outer}, "f" : 1]> g (float[2] x) => (float[2] r) {{ r = f.gelu (x) }}'
    )
    text = f'{header} <domain: "f", opset_import: ["" : {inner}]> gelu (x) => (r) {GELU}'
    model = run("fold-constants,fuse-gelu", text)
    (function,) = model.functions.values()
    assert [node.op_type for node in function][-5:] == ["Div", "Erf", "Add", "Mul", "Mul"]


def test_constants_inside_a_function_wait_for_its_attributes() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "f" : 1]>
    g (float[4,4] x) => (float[4,4] r) { r = f.masked <upper = 0> (x) }
    <domain: "f", opset_import: ["" : 20]> masked <upper> (x) => (r) {
      one = Constant <value_floats = [1.0, 1.0]> ()  shape = Constant <value_ints = [2, 2]> ()
      square = Expand (one, shape)  t = Trilu <upper: int = @upper> (square)
      s = ReduceSum <keepdims = 0> (t)  r = Mul (x, s) }"""
    model = run("fold-constants", text)
    (function,) = model.functions.values()
    assert "Trilu" in {node.op_type for node in function}


def test_declared_types_survive_inference_that_knows_only_shapes() -> None:
    text = """<ir_version: 7, opset_import: ["" : 12, "ai.onnx.preview.training" : 1]>
    g (float a, float b) => (float c, float d, float e) {
      c = Add (a, b)
      d, e = ai.onnx.preview.training.Gradient <xs = ["a", "b"], y = "c"> (a, b) }"""
    model = run("fold-constants", text)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT] * 3


def test_a_fault_that_was_there_before_is_not_the_fault_of_a_pass() -> None:
    """The standard's own inference trips over the function body of this operator at opset 13."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[2,3,4,5] x) => (float[2,3,4,5] r) { y = Identity (x)  r = MeanVarianceNormalization (y) }"""
    assert [node.op_type for node in run("eliminate-identities", text).graph] == ["MeanVarianceNormalization"]


def test_a_preset_has_a_pipeline_per_target() -> None:
    assert "legalize-onnxruntime" in str(Pipeline.preset("exact", target="onnxruntime"))
    with pytest.raises(errors.UsageError, match="unknown preset 'exakt'"):
        Pipeline.preset("exakt", target="onnxruntime")
