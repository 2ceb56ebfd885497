"""Random small graphs with branches, loops, Gemms, Casts and products in a row: every pipeline keeps their outputs."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline
from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.recipe import When
from planish.optimizer.ir.program import Arrays
from planish.optimizer.lowering.export.onnx_file import normalize, signature_of
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import VerifyEach

WIDTH = 32
FLOAT, BOOL, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64


class Nest:
    """A graph in the making, and those around it; every value has the shape [N, WIDTH], every constant is outside."""

    def __init__(self, rng: np.random.Generator, outer: Nest | None = None) -> None:
        self.rng, self.outer = rng, outer
        self.root: Nest = self if outer is None else outer.root
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[str] = ["x"] if outer is None else list(outer.values)
        self.constants: dict[str, np.ndarray] = {}
        self.count = 0

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        self.root.count += 1
        name = f"v{self.root.count}"
        self.nodes.append(oh.make_node(op_type, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        """In the main graph, or in this one."""
        owner = self if self.rng.integers(4) == 0 else self.root
        self.root.count += 1
        owner.constants[f"c{self.root.count}"] = array
        return f"c{self.root.count}"

    def matrix(self, kind: type = np.float32) -> str:
        """A new one, or one that is there already."""
        here = [n for n, a in self.root.constants.items() if a.shape == (WIDTH, WIDTH) and a.dtype == kind]
        if here and self.rng.integers(3) == 0:
            return here[int(self.rng.integers(len(here)))]
        return self.constant((self.rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(kind))

    def grow(self, depth: int) -> str:
        """One more value."""
        x = self.values[int(self.rng.integers(len(self.values)))]
        kinds = ["product", "row", "gemm", "cast", "sum", "tanh", "norm"] + ["if", "loop"] * (depth > 0) * 2
        self.values.append(self._value(kinds[int(self.rng.integers(len(kinds)))], x, depth))
        return self.values[-1]

    def _value(self, kind: str, x: str, depth: int) -> str:
        match kind:
            case "product":
                return self.add("MatMul", x, self.matrix())
            case "row":
                return self.add("MatMul", self.add("MatMul", x, self.matrix()), self.matrix())
            case "gemm":
                bias = [self.constant(self.rng.standard_normal(WIDTH).astype(np.float32))][: int(self.rng.integers(2))]
                turned, alpha = int(self.rng.integers(2)), float(self.rng.choice([1.0, 0.5]))
                return self.add("Gemm", x, self.matrix(), *bias, transB=turned, alpha=alpha)
            case "cast":
                return self.add("MatMul", x, self.add("Cast", self.matrix(np.float16), to=FLOAT))
            case "sum":
                return self.add("Add", x, self.values[int(self.rng.integers(len(self.values)))])
            case "norm":
                line = np.ones(WIDTH, np.float32)
                return self.add("LayerNormalization", x, self.constant(line), self.constant(line))
            case "if":
                branches = {f"{side}_branch": self._inner(depth) for side in ("then", "else")}
                return self.add("If", "flag", **branches)
            case "loop":
                return self.add("Loop", "rounds", "", x, body=self._inner(depth, loop=True))
        return self.add("Tanh", x)

    def _inner(self, depth: int, *, loop: bool = False) -> onnx.GraphProto:
        inner = Nest(self.rng, self)
        self.root.count += 1
        names = [f"{what}{self.root.count}" for what in ("i", "go", "state", "on")]
        if loop:
            inner.values.append(names[2])
        for _ in range(int(self.rng.integers(1, 4))):
            last = inner.grow(depth - 1)
        result = inner.add("Tanh", last)  # keeps numbers of many rounds small
        inputs, outputs = [], [oh.make_tensor_value_info(result, FLOAT, ["N", WIDTH])]
        if loop:
            kinds = zip(names[:3], (INT64, BOOL, FLOAT), ([], [], ["N", WIDTH]), strict=True)
            inputs = [oh.make_tensor_value_info(*each) for each in kinds]
            inner.nodes.append(oh.make_node("Identity", [names[1]], [names[3]], name=names[3]))
            outputs = [oh.make_tensor_value_info(names[3], BOOL, []), *outputs]
        constants = [nh.from_array(array, name) for name, array in inner.constants.items()]
        return oh.make_graph(inner.nodes, names[0], inputs, outputs, constants)

    def model(self, steps: int) -> ir.Model:
        for _ in range(steps):
            self.grow(2)
        result = self.add("Tanh", self.values[-1])
        self.constants["rounds"] = np.array(2)
        shape: list[str | int] = ["N", WIDTH]
        graph = oh.make_graph(
            self.nodes,
            "g",
            [oh.make_tensor_value_info("x", FLOAT, shape), oh.make_tensor_value_info("flag", BOOL, [])],
            [oh.make_tensor_value_info(result, FLOAT, shape)],
            [nh.from_array(array, name) for name, array in self.constants.items()],
        )
        proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10)
        onnx.checker.check_model(proto)
        model: ir.Model = ir.from_proto(proto)
        normalize(model, None)
        return model


def everything(text: str) -> str:
    """The same pipeline, for matrices of any size."""
    passes = [str(one) for one in Pipeline.parse(text).passes]
    sized = ("quantize-int8", "quantize-weights", "quantize-float8", "quantize-embeddings")
    names = [one.partition("{") for one in passes]
    return ",".join(
        f"{n}{{minimum=0 {rest or '}'}".replace(" }", "}") if n in sized else n + brace + rest
        for n, brace, rest in names
    )


PIPELINES = {
    **{
        f"{p}-{t}": presets.pipeline_text(p, t) for p in ("exact", "fast", "small") for t in ("onnxruntime", "openvino")
    },
    **{f"fast-{t}-by-data": str(presets.recipes("fast", t, When.CALIBRATED)[0]) for t in ("onnxruntime", "openvino")},
    "fast-tensorrt": presets.pipeline_text("fast", "tensorrt"),
    "fast-tensorrt-by-data": presets.pipeline_text("fast", "tensorrt", calibrated=True),
    "small-onnxruntime-by-data": presets.pipeline_text("small", "onnxruntime", calibrated=True),
    "bfloat16": "convert-float16{type=bfloat16}",
}


@pytest.mark.breadth
@pytest.mark.parametrize("name", PIPELINES)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 6))
def test_nested_graphs_keep_their_outputs(name: str, seed: int, steps: int) -> None:
    model = Nest(np.random.default_rng(seed)).model(steps)
    x = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)
    cases = [cast("Arrays", {"x": x, "flag": np.array(flag)}) for flag in (True, False)]
    load = registry.backend("onnxruntime").load
    engine = load(model.clone())
    right = [next(iter(engine.run(case).values())) for case in cases]
    observe = Calibrate(signature_of(model), lambda: cases, load)
    outcome = Pipeline.parse(everything(PIPELINES[name])).run(model, [observe, VerifyEach()])
    if name == "bfloat16":
        return  # no kernels of ONNX Runtime on a CPU: that the graph is valid must do
    engine = load(outcome.model)
    for case, wanted in zip(cases, right, strict=True):
        got = next(iter(engine.run(case).values()))
        if name.startswith("exact"):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        else:  # random matrices in 4 bits, one behind the other: a wrong graph is further off than that
            assert float((got * wanted).sum() / np.linalg.norm(got) / np.linalg.norm(wanted)) > 0.8
