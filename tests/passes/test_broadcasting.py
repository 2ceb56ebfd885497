"""Constants of other sizes than a pattern expects are spread by Mul and Add: fusions keep the result, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx.reference
import onnx.shape_inference
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline
from planish.optimizer.interfaces import registry
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import VerifyEach
from tests.passes.test_properties import Drawn

ROWS, WIDTH = 3, 4
SHAPES = [(), (1,), (WIDTH,), (1, WIDTH), (ROWS, 1), (1, 1), (1, 1, 1), (1, ROWS, WIDTH), (2, 1, 1)]
"""Of constants beside values of shape (rows, width): what fits, what is repeated, and what adds axes."""
NUMBERS = [shape for shape in SHAPES if np.prod(shape) == 1]


def drawn(graph: Drawn, shape: tuple[int, ...]) -> str:
    return graph.weight(graph.rng.normal(size=shape).astype(np.float32))


def number(graph: Drawn, value: float, shape: tuple[int, ...]) -> str:
    return graph.weight(np.full(shape, value, np.float32))


Pick = Callable[[Sequence[tuple[int, ...]]], tuple[int, ...]]


def layer_norm(graph: Drawn, pick: Pick) -> str:
    axes = graph.weight(np.array([-1], np.int64))
    centred = graph.add("Sub", "x", graph.add("ReduceMean", "x", axes))
    variance = graph.add("ReduceMean", graph.add("Pow", centred, number(graph, 2, ())), axes)
    root = graph.add("Sqrt", graph.add("Add", variance, number(graph, 1e-5, pick(NUMBERS))))
    scaled = graph.add("Mul", graph.add("Div", centred, root), drawn(graph, pick(SHAPES)))
    return graph.add("Add", scaled, drawn(graph, pick(SHAPES)))


def rms_norm(graph: Drawn, pick: Pick) -> str:
    mean = graph.add("ReduceMean", graph.add("Mul", "x", "x"), graph.weight(np.array([-1], np.int64)))
    root = graph.add("Sqrt", graph.add("Add", mean, number(graph, 1e-5, pick(NUMBERS))))
    return graph.add("Mul", graph.add("Div", "x", root), drawn(graph, pick(SHAPES)))


def gelu(graph: Drawn, pick: Pick) -> str:
    curve = graph.add("Erf", graph.add("Div", "x", number(graph, np.sqrt(2), pick(NUMBERS))))
    one = graph.add("Add", curve, number(graph, 1, pick(NUMBERS)))
    return graph.add("Mul", graph.add("Mul", "x", one), number(graph, 0.5, pick(NUMBERS)))


def projections(graph: Drawn, pick: Pick) -> str:
    """Three products of one value, biases of any size."""
    parts = [graph.add("MatMul", "x", drawn(graph, (WIDTH, WIDTH))) for _ in range(3)]
    left, middle, right = (graph.add("Add", part, drawn(graph, pick(SHAPES))) for part in parts)
    return graph.add("Add", graph.add("Mul", left, middle), right)


def attention(graph: Drawn, pick: Pick) -> str:
    """Queries, keys and values of which each may have one text or head for all, and a mask that has more axes."""
    leading = [(1, 1), (1, 2), (2, 1), (2, 2)]
    row = graph.add("Unsqueeze", "x", graph.weight(np.array([0, 1], np.int64)))
    q, k, v = (graph.add("Mul", row, drawn(graph, (*pick(leading), 1, WIDTH))) for _ in range(3))
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    scaled = graph.add("Mul", scores, number(graph, 0.5, pick([*NUMBERS, (1, 1, 1, 1, 1)])))
    masks: list[tuple[int, ...]] = [(ROWS, ROWS), (1, ROWS), (1,), (2, 1, 1, ROWS), (1, 2, ROWS, ROWS), (ROWS, 1)]
    masked = graph.add("Add", scaled, drawn(graph, pick(masks)))
    return graph.add("MatMul", graph.add("Softmax", masked, axis=-1), v)


def heads(graph: Drawn, pick: Pick) -> str:
    """Rotary positions whose angles are repeated over texts, heads or tokens."""
    axes, start, half, end, last = (graph.weight(np.array(n, np.int64)) for n in ([0, 1], [0], [2], [2**63 - 1], [-1]))
    x = graph.add("Mul", graph.add("Unsqueeze", "x", axes), drawn(graph, (*pick([(1, 1), (1, 2), (2, 2)]), 1, WIDTH)))
    angles = drawn(graph, (pick([(1,), (2,)])[0], pick([(1,), (ROWS,)])[0], WIDTH // 2))
    both = graph.add("Concat", angles, angles, axis=-1)
    cos, sin = (
        graph.add("Unsqueeze", graph.add(f, both), graph.weight(np.array([1], np.int64))) for f in ("Cos", "Sin")
    )
    negated = graph.add("Neg", graph.add("Slice", x, half, end, last))
    rotated = graph.add("Concat", negated, graph.add("Slice", x, start, half, last), axis=-1)
    return graph.add("Add", graph.add("Mul", x, cos), graph.add("Mul", rotated, sin))


PATTERNS = [layer_norm, rms_norm, gelu, projections, attention, heads]


def model_of(pattern: Callable[[Drawn, Pick], str], seed: int, pick: Pick, width: int | str) -> onnx.ModelProto:
    graph = Drawn(np.random.default_rng(seed))
    result = pattern(graph, pick)
    made = oh.make_graph(
        graph.nodes,
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [ROWS, width])],
        [oh.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)],
        [nh.from_array(array, name) for name, array in graph.weights.items()],
    )
    model = oh.make_model(made, opset_imports=[oh.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return np.asarray(registry.backend("onnxruntime").load(ir.from_proto(model)).run({"x": x}).popitem()[1])


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
@pytest.mark.breadth
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_constants_of_any_size(pattern: Callable[[Drawn, Pick], str], data: st.DataObject) -> None:
    def pick(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return data.draw(st.sampled_from(shapes))

    model = model_of(pattern, data.draw(st.integers(0, 9)), pick, "width" if data.draw(st.booleans()) else WIDTH)
    try:
        right = np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, _FEEDS)[0])
    except ValueError:
        return  # these sizes do not fit each other
    text = f"{presets.pipeline_text('exact', 'onnxruntime')},pack-projections"
    outcome = Pipeline.parse(text).run(ir.from_proto(model), [VerifyEach()])
    got = run(ir.to_proto(outcome.model))
    assert got.shape == right.shape
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)


_FEEDS = {"x": np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(layer_norm, "fuse-layer-norm"), (rms_norm, "fuse-rms-norm"), (gelu, "fuse-gelu"), (projections, "pack-projections")],
)  # fmt: skip
def test_what_fits_is_still_fused(pattern: Callable[[Drawn, Pick], str], name: str) -> None:
    model = model_of(pattern, 0, lambda shapes: (WIDTH,) if (WIDTH,) in shapes else (), WIDTH)
    (report,) = Pipeline.parse(name).run(ir.from_proto(model)).reports
    assert len(report.sites) == 1


@pytest.mark.parametrize("shape", [(1,), (1, WIDTH), (ROWS, 1)])
def test_a_scale_of_another_size_is_refused_in_words(shape: tuple[int, ...]) -> None:
    for pattern, name in ((layer_norm, "fuse-layer-norm"), (rms_norm, "fuse-rms-norm")):
        model = model_of(pattern, 0, lambda shapes: shape if shape in shapes and len(shapes) > 4 else (), WIDTH)
        (report,) = Pipeline.parse(name).run(ir.from_proto(model)).reports
        assert not report.sites
        assert "scale" in report.refusals[0].reason
