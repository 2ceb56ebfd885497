"""Products wherever they stand: in a row, in branches and loops, as Gemm, behind a Cast; in 8 bits or refused aloud."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Refusal
from planish.optimizer.interfaces.quantization_pass import QuantizationPass
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.graph import IN_FLOAT
from planish.optimizer.ir.program import Arrays, Program, Provenance
from planish.optimizer.lowering.export.onnx_file import normalize, signature_of
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import VerifyEach

RNG = np.random.default_rng(0)
FLOAT, HALF, BOOL, INT64 = (onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "FLOAT16", "BOOL", "INT64"))
WIDTH = 64


def matrix(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    return nh.from_array((RNG.standard_normal(shape) * 0.1).astype(dtype), name)


def values(kind: int = FLOAT, **shapes: list[str | int]) -> list[onnx.ValueInfoProto]:
    return [oh.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> ir.Model:
    graph = oh.make_graph(nodes, "g", inputs, outputs, constants)
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    model: ir.Model = ir.from_proto(proto)
    normalize(model, None)
    return model


X = [*values(x=["batch", "tokens", WIDTH])]
Y = [*values(y=["batch", "tokens", WIDTH])]


def in_a_row() -> ir.Model:
    """x · W + 2 · x · A · B: an adapter that was not merged."""
    nodes = [
        oh.make_node("MatMul", ["x", "W"], ["w"]),
        oh.make_node("MatMul", ["x", "A"], ["a"]),
        oh.make_node("MatMul", ["a", "B"], ["b"]),
        oh.make_node("Mul", ["b", "scale"], ["scaled"]),
        oh.make_node("Add", ["w", "scaled"], ["y"]),
    ]
    parts = [matrix("W", WIDTH, WIDTH), matrix("A", WIDTH, 32), matrix("B", 32, WIDTH)]
    return model_of(nodes, X, Y, [*parts, nh.from_array(np.float32(2), "scale")])


def _branch(name: str, past: bool) -> onnx.GraphProto:
    """Both branches multiply by the same outer matrices; one by a matrix of its own as well, and names repeat."""
    nodes = [
        oh.make_node("MatMul", ["x", "W"], ["a"]),
        oh.make_node("Relu", ["a"], ["r"]),
        oh.make_node("MatMul", ["r", "V"], ["o"]),
        oh.make_node("MatMul", ["o", "inner"], ["i"]),
        oh.make_node("Add", ["i", "past"], ["p"]) if past else oh.make_node("Neg", ["i"], ["p"]),
    ]
    return oh.make_graph(nodes, name, [], values(p=["batch", "tokens", WIDTH]), [matrix("inner", WIDTH, WIDTH)])


def in_branches() -> ir.Model:
    node = oh.make_node("If", ["flag"], ["z"], then_branch=_branch("t", True), else_branch=_branch("e", False))
    outer = oh.make_node("MatMul", ["z", "W2"], ["y"])
    inputs = [*X, *values(past=["batch", "tokens", WIDTH]), *values(BOOL, flag=[])]
    constants = [matrix("W", WIDTH, 96), matrix("V", 96, WIDTH), matrix("W2", WIDTH, WIDTH)]
    return model_of([node, outer], inputs, Y, constants)


def in_a_loop() -> ir.Model:
    """Three rounds of y = tanh(y · W); W and what starts the loop are outside."""
    body = oh.make_graph(
        [
            oh.make_node("MatMul", ["state", "W"], ["m"]),
            oh.make_node("Tanh", ["m"], ["next"]),
            oh.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [*values(INT64, i=[]), *values(BOOL, go=[]), *values(state=["batch", "tokens", WIDTH])],
        [*values(BOOL, on=[]), *values(next=["batch", "tokens", WIDTH])],
    )
    nodes = [oh.make_node("Loop", ["rounds", "yes", "x"], ["y"], body=body)]
    constants = [nh.from_array(np.array(3), "rounds"), nh.from_array(np.array(True), "yes")]
    return model_of(nodes, X, Y, [*constants, matrix("W", WIDTH, WIDTH)])


def behind_a_cast(kind: type = np.float16) -> ir.Model:
    nodes = [oh.make_node("Cast", ["W"], ["w"], to=FLOAT), oh.make_node("MatMul", ["x", "w"], ["y"])]
    return model_of(nodes, X, Y, [matrix("W", WIDTH, WIDTH, dtype=kind)])


def as_gemm(bias: tuple[int, ...] | None = (WIDTH,), half: bool = False, **attributes: float | int) -> ir.Model:
    cast_w = [oh.make_node("Cast", ["stored"], ["W"], to=FLOAT)] if half else []
    constants = [matrix("stored", 96, WIDTH, dtype=np.float16) if half else matrix("W", 96, WIDTH)]
    if not attributes.get("transB"):
        constants = [matrix("stored" if half else "W", WIDTH, 96, dtype=np.float16 if half else np.float32)]
    constants += [] if bias is None else [matrix("b", *(96 if size == WIDTH else size for size in bias))]
    nodes = [*cast_w, oh.make_node("Gemm", ["x", "W"] + ["b"] * (bias is not None), ["y"], **attributes)]
    return model_of(nodes, values(x=["batch", WIDTH]), values(y=["batch", 96]), constants)


MODELS = {
    "in a row": (in_a_row, 3),
    "in branches": (in_branches, 7),
    "in a loop": (in_a_loop, 1),
    "behind a cast": (behind_a_cast, 1),
    "gemm": (lambda: as_gemm(transB=1), 1),
    "gemm, scaled": (lambda: as_gemm(None, transB=1, alpha=0.5, beta=3.0), 1),
    "gemm, in halves": (lambda: as_gemm(half=True, transB=1), 1),
    "gemm, one bias": (lambda: as_gemm((1,)), 1),
}


def feeds_of(model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Two batches; a branch each."""
    drawn: list[dict[str, np.ndarray]] = []
    for flag in (True, False):
        given: dict[str, np.ndarray] = {}
        for value in model.graph.inputs:
            shape = [
                dim if isinstance(dim, int) else {"batch": 2, "tokens": 3}[dim.value or ""] for dim in value.shape or ()
            ]
            given[value.name or ""] = (
                np.array(flag) if value.dtype is ir.DataType.BOOL else RNG.standard_normal(shape).astype(np.float32)
            )
        drawn.append(given)
    return drawn


def engine_answers(target: str, model: ir.Model, folder: Path, cases: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """What an engine gives that is emitted and opened as a build does."""
    backend: Backend = registry.backend(target)
    folder.mkdir()
    backend.emit(Program({"model": model}, {"model": signature_of(model)}, "", Provenance("onnx", "", {})), folder)
    engine = backend.open(folder)
    return [np.asarray(engine.run(cast("Arrays", case))["y"]) for case in cases]


def quantized(text: str, model: ir.Model, cases: list[dict[str, np.ndarray]]) -> tuple[ir.Model, int, list[Refusal]]:
    """The model after a pipeline, how many products were rounded, and every refusal of the last that rounds."""
    load = registry.backend("onnxruntime").load
    observe = Calibrate(signature_of(model), lambda: cast("list[Arrays]", cases), load)
    outcome = Pipeline.parse(text).run(model, [observe, VerifyEach()])
    rounding = [one.name for one in Pipeline.parse(text).passes if isinstance(one, QuantizationPass)]
    reports = [report for report in outcome.reports if report.name in rounding]
    return outcome.model, sum(len(report.sites) for report in reports), list(reports[-1].refusals)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "small"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_rounded_wherever_they_stand(name: str, target: str, preset: str, tmp_path: Path) -> None:
    make, count = MODELS[name]
    model = make()
    cases = feeds_of(model)
    text = presets.pipeline_text(preset, target).replace("quantize-int8", "quantize-int8{minimum=0}", 1)
    text = text.replace("{minimum=0}{", "{minimum=0 ").replace("quantize-weights{", "quantize-weights{minimum=0 ")
    text = text.replace("quantize-weights,", "quantize-weights{minimum=0},")
    wanted = engine_answers("onnxruntime", model.clone(), tmp_path / "float", cases)
    model, rounded, _ = quantized(text, model, cases)
    # W and A read one value: packed, they are one product.
    assert rounded == count - (name == "in a row" and "pack-projections" in text)
    for right, got in zip(wanted, engine_answers(target, model, tmp_path / "rounded", cases), strict=True):
        error = np.linalg.norm(got - right) / np.linalg.norm(right)
        assert 1e-5 < error < (0.05 if preset == "fast" else 0.35), error
    assert not any(value.const_value is not None and value.const_value.dtype is ir.DataType.FLOAT and value.const_value.size >= 32 * 32
                   for graph in model.graphs() for value in graph.initializers.values())  # fmt: skip


STATIC = "quantize-int8{activations=static minimum=0}"


@pytest.mark.parametrize("calibrated", [STATIC, f"smooth-activations{{anywhere=true}},split-outliers{{channels=4 gain=0.99}},{STATIC}", "quantize-float8{minimum=0}"])  # fmt: skip
def test_products_in_a_row_by_data(calibrated: str) -> None:
    """What was seen of a product's result is still known when the product was rewritten, or split."""
    model = in_a_row()
    cases = feeds_of(model)
    for case in cases:
        case["x"][..., 5] *= 40  # a channel that stands out
    load = registry.backend("onnxruntime").load
    right = load(model.clone()).run(cases[0])["y"]
    model, rounded, refusals = quantized(calibrated, model, cases)
    assert (rounded, [r for r in refusals if "channels that stand out" not in r.reason]) == (3, [])
    got = load(model).run(cases[0])["y"] if "float8" not in calibrated else None
    assert got is None or np.linalg.norm(got - right) < 0.1 * np.linalg.norm(right)


def test_split_products_in_a_row_are_what_they_were() -> None:
    """The second product reads the whole result of the first, not only what the ordinary channels give."""
    model = in_a_row()
    cases = feeds_of(model)
    for case in cases:
        case["x"][..., 5] *= 400
    load = registry.backend("onnxruntime").load
    right = load(model.clone()).run(cases[0])["y"]
    observe = Calibrate(signature_of(model), lambda: cast("list[Arrays]", cases), load)
    text = "split-outliers{channels=4 gain=0.99}"
    (report,) = Pipeline.parse(text).run(model, [observe, VerifyEach()]).reports
    assert len(report.sites) == 2  # x, and the result of the first product
    np.testing.assert_allclose(load(model).run(cases[0])["y"], right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["in branches", "in a loop"])
def test_fixed_steps_in_a_subgraph_are_refused_with_the_reason(name: str) -> None:
    model = MODELS[name][0]()
    cases = feeds_of(model)
    _, rounded, refusals = quantized(STATIC, model, cases)
    reasons = {refusal.reason for refusal in refusals}
    assert rounded == (3 if name == "in branches" else 0)  # products of outer values can be observed
    assert reasons == {"its activation is a value of a subgraph or a constant, which calibration cannot observe"}
    assert rounded + len(refusals) == MODELS[name][1]


def test_what_is_no_site_is_counted() -> None:
    nodes = [
        oh.make_node("MatMul", ["x", "W"], ["h"]),
        oh.make_node("MatMul", ["x", "h"], ["m"]),
        oh.make_node("Gemm", ["m", "h"], ["y"], transA=1),
    ]
    half = matrix("W", WIDTH, WIDTH, dtype=np.float16)
    shape: list[str | int] = [WIDTH, WIDTH]
    model = model_of(nodes, values(HALF, x=shape), values(HALF, y=shape), [half])
    _, rounded, refusals = quantized("quantize-int8", model, [])
    reasons = sorted(refusal.reason for refusal in refusals)
    assert rounded == 0
    assert reasons == ["its matrix is FLOAT16, not FLOAT"] + ["its right operand is not a constant matrix"] * 2
    _, rounded, refusals = quantized("quantize-int8", as_gemm(), [])
    assert (rounded, len(refusals)) == (0, 1)
    assert "unfuse-gemm{anywhere=true}" in refusals[0].reason


def test_names_that_are_taken_are_left_to_those_who_have_them(tmp_path: Path) -> None:
    """What is written is named after what was there; here every such name belongs to something else already."""
    nodes = [
        oh.make_node("Relu", ["x"], ["y_uint8"]),
        oh.make_node("MatMul", ["y_uint8", "W"], ["y_float"]),
        oh.make_node("MatMul", ["y_float", "W"], ["y_columns"]),
        oh.make_node("Add", ["y_columns", "W_int8"], ["y"]),
    ]
    constants = [matrix("W", WIDTH, WIDTH), matrix("W_int8", WIDTH), matrix("int8_tiny", 1)]
    model = model_of(nodes, X, Y, constants)
    cases = feeds_of(model)
    wanted = engine_answers("onnxruntime", model.clone(), tmp_path / "float", cases)
    model, rounded, _ = quantized("quantize-int8{minimum=0}", model, cases)
    assert rounded == 2
    for right, got in zip(wanted, engine_answers("onnxruntime", model, tmp_path / "int8", cases), strict=True):
        np.testing.assert_allclose(got, right, atol=0.1 * np.abs(right).max())


def test_a_saved_model_with_branches_is_read_again(tmp_path: Path) -> None:
    """Integers of inner matrices lie in the main graph: a file holds them once, and every runtime finds them."""
    model, _, _ = quantized("quantize-int8{minimum=0},legalize-onnxruntime", in_branches(), [])
    onnx_io.save(model, tmp_path / "m.onnx")
    again = onnx_io.load(tmp_path / "m.onnx")
    stored = [n for n, v in again.graph.initializers.items() if v.dtype is ir.DataType.INT8]
    assert len(stored) == len(set(stored)) == 5
    assert sum(node.op_type == "MatMulIntegerToFloat" for graph in again.graphs() for node in graph) == 7


def test_products_that_stay_in_float_are_not_packed() -> None:
    """`split-outliers` gives each projection one of its own, of the same few channels: packed, they would be rounded."""
    nodes = [
        oh.make_node("MatMul", ["x", "V"], ["v"]),
        oh.make_node("MatMul", ["x", "W"], ["w"]),
        oh.make_node("Add", ["v", "w"], ["y"]),
    ]
    model = model_of(nodes, X, Y, [matrix("V", WIDTH, WIDTH), matrix("W", WIDTH, WIDTH)])
    assert Pipeline.parse("pack-projections").run(model.clone()).reports[0].modified
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props[IN_FLOAT] = ""
    assert not Pipeline.parse("pack-projections").run(model).reports[0].modified
