"""Rewrites preserve outputs: random small graphs through every exact pass, alone and in presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx.reference
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline
from planish.optimizer.interfaces import registry
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import VerifyEach, fingerprint

EXACT = sorted(name for name, entry in registry.table(registry.PASSES).items() if entry.load().exact)
PIPELINES = [*EXACT, *{presets.pipeline_text("exact", target) for target in ("onnxruntime", "openvino")}]
FEATURES = 4


@dataclass
class Drawn:
    """A graph in the making; every value has the shape [batch, FEATURES]."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    values: list[str] = field(default_factory=lambda: ["x"])

    def weight(self, array: np.ndarray) -> str:
        """A constant; the same numbers are written again each time, as exporters do."""
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def floats(self, *shape: int) -> str:
        """Random numbers; one in three times those of an earlier constant."""
        same = [array for array in self.weights.values() if array.shape == shape and array.dtype == np.float32]
        fresh = self.rng.normal(size=shape).astype(np.float32)
        return self.weight(same[0] if same and self.rng.integers(3) == 0 else fresh)

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(oh.make_node(op_type, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes))
        return name


def elementwise(graph: Drawn, x: str, y: str) -> str:
    return graph.add(["Add", "Mul", "Sub"][int(graph.rng.integers(3))], x, y)


def unary(graph: Drawn, x: str, _: str) -> str:
    return graph.add(["Relu", "Tanh", "Neg", "Identity", "Sigmoid"][int(graph.rng.integers(5))], x)


def neutral(graph: Drawn, x: str, _: str) -> str:
    number = float(graph.rng.integers(2))
    return graph.add("Mul" if number else "Add", x, graph.weight(np.full(1, number, np.float32)))


def product(graph: Drawn, x: str, _: str) -> str:
    out = graph.add("MatMul", x, graph.floats(FEATURES, FEATURES))
    return graph.add("Add", out, graph.floats(FEATURES)) if graph.rng.integers(2) else out


def there_and_back(graph: Drawn, x: str, _: str) -> str:
    return graph.add("Transpose", graph.add("Transpose", x, perm=[1, 0]), perm=[1, 0])


def reshaped(graph: Drawn, x: str, _: str) -> str:
    """Shape arithmetic as exporters write it: take the first size, put it before a constant."""
    first = graph.add("Gather", graph.add("Shape", x), graph.weight(np.array([0], np.int64)))
    shape = graph.add("Concat", first, graph.weight(np.array([FEATURES], np.int64)), axis=0)
    return graph.add("Reshape", x, shape)


def constant_expression(graph: Drawn, x: str, _: str) -> str:
    return graph.add("Add", x, graph.add("Mul", graph.floats(FEATURES), graph.floats(FEATURES)))


def gelu(graph: Drawn, x: str, _: str) -> str:
    root = graph.weight(np.array(np.sqrt(2), np.float32))
    curve = graph.add("Erf", graph.add("Div", x, root))
    one = graph.add("Add", curve, graph.weight(np.array(1, np.float32)))
    half = graph.weight(np.array(0.5, np.float32))
    return graph.add("Mul", graph.add("Mul", x, one), half)


def layer_norm(graph: Drawn, x: str, _: str) -> str:
    axes = graph.weight(np.array([-1], np.int64))
    centred = graph.add("Sub", x, graph.add("ReduceMean", x, axes))
    variance = graph.add("ReduceMean", graph.add("Mul", centred, centred), axes)
    deviation = graph.add("Sqrt", graph.add("Add", variance, graph.weight(np.array(1e-5, np.float32))))
    scaled = graph.add("Mul", graph.add("Div", centred, deviation), graph.floats(FEATURES))
    return graph.add("Add", scaled, graph.floats(FEATURES))


def rms_norm(graph: Drawn, x: str, _: str) -> str:
    mean = graph.add("ReduceMean", graph.add("Mul", x, x), graph.weight(np.array([-1], np.int64)))
    root = graph.add("Sqrt", graph.add("Add", mean, graph.weight(np.array(1e-5, np.float32))))
    return graph.add("Mul", graph.add("Mul", x, graph.add("Reciprocal", root)), graph.floats(FEATURES))


def rotary(graph: Drawn, x: str, y: str) -> str:
    """Rows are positions, one head; half of the features of ``y`` are the angles."""
    axes, last, axis = (graph.weight(np.array(number, np.int64)) for number in ([0, 1], [-1], [1]))
    start, half, end = (graph.weight(np.array([number], np.int64)) for number in (0, FEATURES // 2, 2**63 - 1))
    angles = graph.add("Unsqueeze", graph.add("Slice", y, start, half, last), graph.weight(np.array([0], np.int64)))
    both = graph.add("Concat", angles, angles, axis=-1)
    cos, sin = (graph.add("Unsqueeze", graph.add(curve, both), axis) for curve in ("Cos", "Sin"))
    heads = graph.add("Unsqueeze", x, axes)
    negated = graph.add("Neg", graph.add("Slice", heads, half, end, last))
    rotated = graph.add("Concat", negated, graph.add("Slice", heads, start, half, last), axis=-1)
    total = graph.add("Add", graph.add("Mul", heads, cos), graph.add("Mul", rotated, sin))
    return graph.add("Squeeze", total, axes)


def attention(graph: Drawn, x: str, y: str) -> str:
    """Rows attend to rows; one head, the batch axis standing for the sequence."""
    axes = graph.weight(np.array([0, 1], np.int64))
    q, k, v = (
        graph.add("Unsqueeze", graph.add("MatMul", s, graph.floats(FEATURES, FEATURES)), axes) for s in (x, y, y)
    )
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    scaled = graph.add("Mul", scores, graph.weight(np.array(0.5, np.float32)))
    mixed = graph.add("MatMul", graph.add("Softmax", scaled, axis=-1), v)
    return graph.add("Squeeze", mixed, axes)


STEPS: list[Callable[[Drawn, str, str], str]] = [
    *(elementwise, unary, neutral, product, there_and_back, reshaped, constant_expression, gelu, layer_norm),
    *(rms_norm, rotary, attention),
]


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """A graph of 1 to 8 building blocks over a batch of unknown size, some of whose values leave it."""
    graph = Drawn(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8)):
        x, y = (graph.values[draw(st.integers(0, len(graph.values) - 1))] for _ in range(2))
        graph.values.append(step(graph, x, y))
    outputs = dict.fromkeys([graph.values[-1], *graph.values[1 :: draw(st.integers(2, 5))]])
    made = oh.make_graph(
        graph.nodes,
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", FEATURES])],
        [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", FEATURES]) for name in outputs],
        [nh.from_array(array, name) for name, array in graph.weights.items()],
    )
    model = oh.make_model(made, opset_imports=[oh.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    x = np.random.default_rng(1).normal(size=(3, FEATURES)).astype(np.float32)
    return [np.asarray(array) for array in onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})]


COMMON = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pipeline", PIPELINES, ids=lambda text: text.partition(",")[0] if "," not in text else "preset"
)
@COMMON
@given(model=graphs())
def test_exact_rewrites_preserve_outputs(pipeline: str, model: onnx.ModelProto) -> None:
    outcome = Pipeline.parse(pipeline).run(ir.from_proto(model), [VerifyEach()])
    for one, other in zip(run(model), run(ir.to_proto(outcome.model)), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@COMMON
@given(model=graphs())
def test_a_second_run_changes_nothing(name: str, model: onnx.ModelProto) -> None:
    once = Pipeline.parse(name).run(ir.from_proto(model)).model
    before = fingerprint(once)
    again = Pipeline.parse(name).run(once)
    assert [report.modified for report in again.reports] == [False]
    assert fingerprint(again.model) == before


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["token", "tensor", "runtime"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), inner=st.integers(1, 40), columns=st.integers(1, 9))
def test_quantized_products_stay_within_the_bound_of_their_scales(
    activations: str, seed: int, rows: int, inner: int, columns: int
) -> None:
    """|error| <= Σ (half a step of w · |x| + half a step of x · |w| + both halves), from the definition of rounding."""
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, inner), (inner, columns)))
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["r"])],
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", inner])],
        [oh.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["N", columns])],
        [nh.from_array(w, "w")],
    )
    model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))
    done = Pipeline.parse(f"quantize-int8{{activations={activations} minimum=1}}").run(model, [VerifyEach()]).model
    (found,) = onnx.reference.ReferenceEvaluator(ir.to_proto(done)).run(None, {"x": x})
    of_w = np.abs(w).max(axis=0) / 127 / 2
    reach = {"token": np.abs(x).max(axis=1, keepdims=True) / 127, "tensor": np.ptp([*x.ravel(), 0]) / 255, "runtime": 0}
    of_x = np.broadcast_to(reach[activations] / 2, (rows, 1)) * (2 if activations == "tensor" else 1)
    bound = np.abs(x).sum(1, keepdims=True) * of_w + of_x * np.abs(w).sum(0) + inner * of_x * of_w
    assert (np.abs(np.asarray(found) - x @ w) <= bound * 1.001 + 1e-5).all()
