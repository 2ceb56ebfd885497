"""Quantizing passes: their integers, their operators, and what they skip."""

from __future__ import annotations

import math

import numpy as np
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline, registry
from planish.optimizer.instruments import VerifyEach
from planish.passes.quantization._rounding import Method, blocks_of

ROWS, COLUMNS = 64, 24


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


def matrix_of(seed: int, shape: tuple[int, int] = (ROWS, COLUMNS)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["nearest", "mse", "hqq"])
def test_what_is_stored_is_what_is_computed(bits: int, symmetric: bool, method: Method) -> None:
    matrix, data = matrix_of(0), matrix_of(1, (6, ROWS)).reshape(2, 3, ROWS)
    model = product(matrix)
    text = f"quantize-weights{{bits={bits} block=16 symmetric={str(symmetric).lower()} method={method} minimum=0}}"
    (report,) = Pipeline.parse(text).run(model, [VerifyEach()]).reports
    assert len(report.sites) == 2
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == 1  # both read the same
    blocks = blocks_of(matrix, bits, 16, symmetric=symmetric, method=method)
    wanted = 2 * data @ blocks.restored(matrix)
    np.testing.assert_allclose(answer(model, data), wanted, rtol=1e-4, atol=1e-4)
    packed = model.clone()
    Pipeline.parse("use-matmul-nbits{activations=float}").run(packed, [VerifyEach()])
    assert [node.op_type for node in packed.graph].count("MatMulNBits") == 2
    np.testing.assert_allclose(answer(packed, data), wanted, rtol=1e-3, atol=1e-3)
    Pipeline.parse("use-matmul-nbits").run(model)
    error = np.abs(answer(model, data) - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < 0.02  # activations are in int8


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    method=st.sampled_from(["nearest", "mse", "hqq"]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_entry_is_further_than_its_range_allows(
    bits: int, symmetric: bool, method: Method, scale: float, zeros: bool, seed: int
) -> None:
    matrix = matrix_of(seed) * np.float32(scale)
    matrix[:16] *= 0 if zeros else 1  # a block of zeros
    found = blocks_of(matrix, bits, 16, symmetric=symmetric, method=method)
    integers, restored = found.integers(matrix), found.restored(matrix)
    assert np.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert integers.min() >= low
    assert integers.max() <= high
    assert not zeros or not restored[:16].any()
    reach = np.abs(matrix).reshape(-1, 16, COLUMNS).max(axis=1, keepdims=True)
    error = np.abs(restored - matrix).reshape(-1, 16, COLUMNS)
    assert (error <= reach * (1.01 if bits == 4 else 0.6) + 1e-30).all()


def test_a_search_is_never_worse_than_the_whole_range() -> None:
    matrix = np.random.default_rng(0).standard_t(3, (256, 32)).astype(np.float32)  # outliers
    errors = {
        method: float(
            np.square(blocks_of(matrix, 4, 64, symmetric=True, method=method).restored(matrix) - matrix).sum()
        )
        for method in ("nearest", "mse")
    }
    assert errors["mse"] < 0.9 * errors["nearest"]


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
