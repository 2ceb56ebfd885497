"""Quantizing passes: their integers, their operators, and what they skip."""

from __future__ import annotations

import math

import numpy as np
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Arrays, Role, Signature, TensorSpec
from planish.optimizer.pipeline.instruments import VerifyEach
from planish.passes.quantization._blocks import BlockFormat, QuantizedBlocks
from planish.passes.quantization.methods import METHODS
from planish.passes.quantization.methods.mse import Mse

ROWS, COLUMNS = 64, 96  # of more than 1024 bytes in 4 bits: what checks lend to the runtime


def product(matrix: np.ndarray) -> ir.Model:
    """r = x · matrix, the matrix twice: x · matrix + x · matrix."""
    tensors = [nh.from_array(matrix, "w")]
    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["p"], name="first"),
        oh.make_node("MatMul", ["x", "w"], ["q"], name="second"),
        oh.make_node("Add", ["p", "q"], ["r"], name="sum"),
    ]
    shapes = [("x", ["batch", "sequence", matrix.shape[0]]), ("r", ["batch", "sequence", matrix.shape[1]])]
    values = [oh.make_tensor_value_info(name, 1, shape) for name, shape in shapes]
    graph = oh.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model: ir.Model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))
    return model


def answer(model: ir.Model, data: np.ndarray) -> np.ndarray:
    return np.asarray(registry.backend("onnxruntime").load(model).run({"x": data})["r"])


def matrix_of(seed: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["nearest", "mse", "hqq"])
def test_what_is_stored_is_what_is_computed(bits: int, symmetric: bool, method: str) -> None:
    matrix, data = matrix_of(0), matrix_of(1, (6, ROWS)).reshape(2, 3, ROWS)
    model = product(matrix)
    text = f"quantize-weights{{bits={bits} block=16 symmetric={str(symmetric).lower()} method={method} minimum=0}}"
    (report,) = Pipeline.parse(text).run(model, [VerifyEach()]).reports
    assert len(report.sites) == 2
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == 1  # both read the same
    wanted = 2 * data @ METHODS[method](BlockFormat(bits, 16, symmetric)).fit(matrix).dequantized(matrix)
    np.testing.assert_allclose(answer(model, data), wanted, rtol=1e-4, atol=1e-4)
    packed = model.clone()
    Pipeline.parse("use-matmul-nbits{activations=float}").run(packed, [VerifyEach()])
    assert [node.op_type for node in packed.graph].count("MatMulNBits") == 2
    np.testing.assert_allclose(answer(packed, data), wanted, rtol=1e-3, atol=1e-3)
    Pipeline.parse("use-matmul-nbits").run(model)
    error = np.abs(answer(model, data) - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < 0.02  # activations are in int8


def test_copies_of_a_model_share_what_depends_on_a_matrix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    fit = Mse.fit

    def counted(method: Mse, matrix: np.ndarray, activation: ir.Value | None = None) -> QuantizedBlocks:
        asked.append(method.format.bits)
        return fit(method, matrix, activation)

    monkeypatch.setattr(Mse, "fit", counted)
    model = product(matrix_of(0))
    for bits in (4, 4, 8):
        Pipeline.parse(f"quantize-weights{{bits={bits} minimum=0}}").run(model.clone())
    assert asked == [4, 8]


def test_what_is_skipped_or_does_not_fit_says_why() -> None:
    (report,) = Pipeline.parse("quantize-weights{minimum=0 block=32 skip=[second]}").run(product(matrix_of(0))).reports
    assert [len(report.sites), report.refusals[0].reason] == [1, "it is skipped, as the pass was asked to"]
    (report,) = Pipeline.parse("quantize-weights{minimum=0 block=128}").run(product(matrix_of(0))).reports
    assert {refusal.reason for refusal in report.refusals} == {"its 64 rows are no multiple of a block of 128"}
    broken = matrix_of(0)
    broken[3, 3] = math.nan
    for name in ("quantize-weights{minimum=0}", "quantize-int8{minimum=0}"):
        (report,) = Pipeline.parse(name).run(product(broken)).reports
        assert (report.modified, report.refusals[0].reason) == (False, "its matrix holds NaN or infinity")


def observed(model: ir.Model, data: np.ndarray, text: str) -> ir.Model:
    """The model after a pipeline whose passes saw ``data``."""
    names = [value.name or "" for value in model.graph.inputs]
    signature = Signature(tuple(TensorSpec(n, ir.DataType.FLOAT, (), Role.VALUES) for n in names), ())
    load = registry.backend("onnxruntime").load
    Pipeline.parse(text).run(model, [Calibrate(signature, lambda: [dict.fromkeys(names, data)], load), VerifyEach()])
    return model


def heavy(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Data whose channels are correlated, and a few of them large: what activations look like."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((shape[-1], shape[-1])).astype(np.float32) / 4
    mixing[:, :3] *= 20
    return np.asarray(rng.standard_normal(shape).astype(np.float32) @ mixing)


def test_gptq_keeps_products_and_not_the_matrix() -> None:
    matrix, seen_data, unseen = matrix_of(0, (256, 32)), heavy(1, (1, 600, 256)), heavy(2, (1, 200, 256))
    wanted = answer(product(matrix), unseen)
    errors = {
        method: float(np.square(answer(observed(product(matrix), seen_data, text), unseen) - wanted).sum())
        for method in ("nearest", "mse", "gptq")
        for text in [f"quantize-weights{{bits=4 minimum=0 method={method}}}"]
    }
    assert errors["gptq"] < 0.5 * min(errors["nearest"], errors["mse"])


def stored(model: ir.Model) -> dict[str, np.ndarray]:
    """Integers and scales of a model, by name."""
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("method", ["nearest", "mse", "hqq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_strip_by_strip_it_is_the_same(method: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, data = matrix_of(0, (64, 40)), heavy(1, (1, 200, 64))
    text = f"quantize-weights{{bits=4 minimum=0 method={method} symmetric={str(symmetric).lower()}}}"
    whole = stored(observed(product(matrix), data, text))
    monkeypatch.setattr("planish.passes.quantization._blocks._STRIP", 64 * 7)
    strips = stored(observed(product(matrix), data, text))
    assert whole.keys() == strips.keys()
    for name, array in whole.items():
        assert (array != strips[name]).mean() <= (0.01 if method == "gptq" else 0)  # its sums may round otherwise


@pytest.mark.parametrize(
    "text", ["quantize-weights{bits=4 minimum=0 method=gptq}", "smooth-activations{method=search anywhere=true}"]
)
def test_what_is_bulky_is_seen_in_turns_and_forgotten(text: str) -> None:
    made, held = [], []
    for limit in (1 << 30, 1):
        model, data = normalized(matrix_of(0)), heavy(1, (1, 200, ROWS))
        signature = Signature((TensorSpec("x", ir.DataType.FLOAT, ("batch", "sequence", ROWS), Role.VALUES),), ())
        batches: list[Arrays] = [{"x": data}]
        observe = Calibrate(signature, batches.copy, registry.backend("onnxruntime").load, limit=limit)
        (pass_,) = Pipeline.parse(text).passes
        observe.gather(pass_, model)
        held += [
            value for node in model.graph for value in node.inputs if value is not None and "GramObserver" in value.meta
        ]
        assert pass_(model).modified
        made.append(stored(model))
    assert not held
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


def test_gptq_of_channels_that_were_never_used() -> None:
    matrix, data = matrix_of(0), matrix_of(1, (1, 40, ROWS))
    data[..., 5:20] = 0
    found = answer(observed(product(matrix), data, "quantize-weights{bits=4 minimum=0 method=gptq}"), data)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, answer(product(matrix), data), atol=0.2 * np.abs(found).max())


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("signed", [True, False])
def test_fixed_steps_keep_ordinary_entries(method: str, signed: bool) -> None:
    matrix, data = matrix_of(0), matrix_of(1, (4, 300, ROWS)) + np.float32(0.5)
    text = f"quantize-int8{{activations=static range={method} signed={str(signed).lower()} minimum=0}}"
    found, wanted = answer(observed(product(matrix), data, text), data), answer(product(matrix), data)
    assert np.square(found - wanted).sum() < 1e-3 * np.square(wanted).sum()


def test_outliers_are_given_up_or_weighed() -> None:
    matrix, data = matrix_of(0), matrix_of(1, (4, 300, ROWS))
    data[0, 0, 0] = 300
    wanted = answer(product(matrix), data)
    found = {
        method: np.square(answer(observed(product(matrix), data, text), data) - wanted)
        for method in ("minmax", "percentile", "entropy", "mse")
        for text in [f"quantize-int8{{activations=static range={method} minimum=0}}"]
    }
    ordinary = {method: float(error[1:].sum()) for method, error in found.items()}
    assert ordinary["percentile"] < 0.1 * ordinary["minmax"]
    assert ordinary["entropy"] < 0.1 * ordinary["minmax"]
    assert found["mse"].sum() < min(found["minmax"].sum(), found["percentile"].sum())  # the outlier counts


def test_a_constant_activation_and_one_that_was_not_seen() -> None:
    matrix = matrix_of(0)
    zeros = np.zeros((1, 4, ROWS), np.float32)
    static = "quantize-int8{activations=static minimum=0}"
    assert not answer(observed(product(matrix), zeros, static), zeros).any()
    for text, reason in (
        (static, "fixed scales need calibration data"),
        ("quantize-weights{method=gptq minimum=0}", "gptq"),
    ):
        (report,) = Pipeline.parse(text).run(product(matrix)).reports
        assert reason in report.refusals[0].reason
    broken = zeros.copy()
    broken[0, 0, 0] = math.nan
    model = observed(product(matrix), broken, static)
    assert {node.op_type for node in model.graph} == {"MatMul", "Add"}


def normalized(matrix: np.ndarray) -> ir.Model:
    """r = LayerNormalization (x) · matrix, the scale of the normalization large for a few channels."""
    scale = np.ones(len(matrix), np.float32)
    scale[:4] = 60
    tensors = [nh.from_array(matrix, "w"), nh.from_array(scale, "g"), nh.from_array(scale * 0, "b")]
    nodes = [
        oh.make_node("LayerNormalization", ["x", "g", "b"], ["y"], name="norm"),
        oh.make_node("MatMul", ["y", "w"], ["r"], name="product"),
    ]
    shapes = [("x", len(matrix)), ("y", len(matrix)), ("r", matrix.shape[1])]
    values = [oh.make_tensor_value_info(name, 1, ["batch", "sequence", width]) for name, width in shapes]
    graph = oh.make_graph(nodes, "g", values[:1], values[2:], tensors, value_info=values[1:2])
    model: ir.Model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))
    return model


@pytest.mark.parametrize(
    ("smooth", "quantize"),
    [
        ("smooth-activations", "quantize-int8{activations=static minimum=0 range=minmax}"),
        ("smooth-activations{method=search}", "quantize-weights{bits=4 minimum=0 method=nearest}"),
    ],
)
def test_even_channels_lose_less(smooth: str, quantize: str) -> None:
    matrix, data = matrix_of(0), matrix_of(1, (2, 100, ROWS))
    wanted = answer(normalized(matrix), data)
    np.testing.assert_allclose(answer(observed(normalized(matrix), data, smooth), data), wanted, rtol=1e-3, atol=1e-3)
    errors = [
        float(np.square(answer(observed(normalized(matrix), data, text), data) - wanted).sum())
        for text in (quantize, f"{smooth},{quantize}")
    ]
    assert errors[1] < 0.7 * errors[0]


def test_a_corrected_bias_takes_out_the_mean_error() -> None:
    matrix, data = matrix_of(0), matrix_of(1, (1, 300, ROWS)) + np.float32(2)

    def biased() -> ir.Model:
        model = product(matrix)
        add = model.graph[-1]
        bias = ir.Value(name="c", shape=ir.Shape([COLUMNS]), type=ir.TensorType(ir.DataType.FLOAT))
        bias.const_value = ir.tensor(np.ones(COLUMNS, np.float32), name="c")
        model.graph.register_initializer(bias)
        add.replace_input_with(1, bias)
        return model

    wanted = answer(biased(), data)
    errors = [
        np.abs((answer(observed(biased(), data, text), data) - wanted).mean(axis=(0, 1))).max()
        for text in ("quantize-weights{bits=4 minimum=0}", "quantize-weights{bits=4 minimum=0 correct_bias=true}")
    ]
    assert errors[1] < 0.01 * errors[0]
