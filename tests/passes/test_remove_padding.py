"""`remove-padding`: whatever is padded, and wherever, tokens that count come out as before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline
from planish.optimizer.fidelity.inputs import make_case
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.lowering import lower
from planish.optimizer.pipeline.instruments import VerifyEach
from planish.optimizer.runtime.cases import positions_of
from tests.zoo import GENERATORS, build

WIDTH = 4
STEPS = (
    "product",
    "bias",
    "norm",
    "rms",
    "activation",
    "residual",
    "places",
    "heads",
    "softmax",
    "clip",
    "attention",
)
MASKS = {"int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32, "bool": onnx.TensorProto.BOOL}


@dataclass
class Encoder:
    """A random stack of what encoders are made of; every value has the shape [batch, sequence, WIDTH]."""

    rng: np.random.Generator
    mask: str
    flat: bool = True
    """Whether attention takes its heads side by side."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    value: str = "x"

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(oh.make_node(op_type, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def constant(self, array: np.ndarray | float) -> str:
        self.weights.append(nh.from_array(np.asarray(array), f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def floats(self, *shape: int) -> str:
        return self.constant(self.rng.normal(size=shape).astype(np.float32))

    def step(self, kind: str) -> None:
        """One more layer."""
        x, before = self.value, [f"v{i}" for i, node in enumerate(self.nodes) if node.op_type == "Add"]
        if kind == "product":
            self.value = self.add("MatMul", x, self.floats(WIDTH, WIDTH))
        elif kind == "bias":
            self.value = self.add("Add", self.floats(WIDTH), x)
        elif kind == "norm":
            self.value = self.add("LayerNormalization", x, self.floats(WIDTH), self.floats(WIDTH), axis=2)
        elif kind == "rms":
            self.value = self.add("RMSNormalization", x, self.floats(WIDTH))
        elif kind == "activation":
            self.value = self.add("Gelu", x)
        elif kind == "residual":
            self.value = self.add("Add", x, self.rng.choice(["x", *before]))
        elif kind == "places":  # the same for all texts, another for each token
            self.value = self.add("Add", x, "places")
        elif kind == "heads":
            split = self.add("Reshape", x, self.constant(np.array([0, 0, 2, 2])))
            scaled = self.add("Mul", split, self.floats(2, 1))
            self.value = self.add("Reshape", scaled, self.constant(np.array([0, 0, WIDTH])))
        elif kind == "softmax":
            self.value = self.add("Softmax", x, axis=-1)
        elif kind == "clip":
            self.value = self.add("Clip", x, *map(self.constant, np.array([-1, 1], np.float32)))
        else:
            rows = self.add("Unsqueeze", "counts", *self.line([1, 3]))
            every = self.add("Or", rows, self.add("Not", rows))  # a row for each query, as the runtime wants it
            mask = self.add("And", self.add("Unsqueeze", "counts", *self.line([1, 2])), every)
            if self.flat:
                self.value = self.add("Attention", x, x, x, mask, q_num_heads=2, kv_num_heads=2)
                return
            split = self.add("Reshape", x, *self.line([0, 0, 2, 2]))
            heads = self.add("Transpose", split, perm=[0, 2, 1, 3])
            joined = self.add("Transpose", self.add("Attention", heads, heads, heads, mask), perm=[0, 2, 1, 3])
            self.value = self.add("Reshape", joined, *self.line([0, 0, WIDTH]))

    def line(self, *entries: list[int]) -> list[str]:
        return [self.constant(np.array(one)) for one in entries]

    def model(self) -> ir.Model:
        """The graph, which gives the last value and that of the first token, with the shapes that inference finds."""
        self.nodes.insert(0, oh.make_node("Cast", ["attention_mask"], ["counts"], to=onnx.TensorProto.BOOL))
        first = oh.make_node("Gather", [self.value, "zero"], ["first"], axis=1)
        last = oh.make_node("Identity", [self.value], ["last"])
        taken, floats = ["batch", "sequence", WIDTH], onnx.TensorProto.FLOAT
        graph = oh.make_graph(
            [*self.nodes, first, last],
            "g",
            [
                oh.make_tensor_value_info("x", floats, taken),
                oh.make_tensor_value_info("places", floats, [1, "sequence", WIDTH]),
                oh.make_tensor_value_info("attention_mask", MASKS[self.mask], ["batch", "sequence"]),
            ],
            [
                oh.make_tensor_value_info("first", floats, ["batch", WIDTH]),
                oh.make_tensor_value_info("last", floats, taken),
            ],
            [*self.weights, nh.from_array(np.array(0), "zero")],
        )
        proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10)
        model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        return model


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=12),
    mask=st.sampled_from(sorted(MASKS)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    seed=st.integers(0, 1000),
    spelled_out=st.booleans(),
)
def test_tokens_that_count_come_out_as_before(
    steps: list[str], mask: str, shape: tuple[int, int], seed: int, spelled_out: bool
) -> None:
    rng = np.random.default_rng(seed)
    encoder = Encoder(rng, mask, flat=not spelled_out)
    for kind in steps:
        encoder.step(kind)
    model = encoder.model()
    counts = rng.random(shape) < 0.6  # padding on either side, in the middle, or all
    feeds = {
        "x": rng.normal(size=(*shape, WIDTH)).astype(np.float32),
        "places": rng.normal(size=(1, shape[1], WIDTH)).astype(np.float32),
        "attention_mask": counts.astype(oh.tensor_dtype_to_np_dtype(MASKS[mask])),
    }
    before = registry.backend("onnxruntime").load(model).run(feeds)
    before_it = "legalize-openvino," if spelled_out else ""
    outcome = Pipeline.parse(f"{before_it}remove-padding").run(model, [VerifyEach()])
    assert bool(outcome.reports[-1].sites) == ("product" in steps)
    after = registry.backend("onnxruntime").load(model).run(feeds)
    heard = counts.any(axis=1)  # attention over no token at all is whatever a runtime makes of it
    np.testing.assert_allclose(after["first"][heard], before["first"][heard], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["last"][counts], before["last"][counts], rtol=1e-4, atol=1e-5)
    again = Pipeline.parse("remove-padding").run(model)
    assert not again.reports[0].modified


@pytest.mark.parametrize("op_type", ["ReduceMean", "CumSum"])
def test_what_reads_padding_is_left_alone(op_type: str) -> None:
    encoder = Encoder(np.random.default_rng(0), "int64")
    encoder.step("product")
    axis = encoder.constant(np.array([1] if op_type == "ReduceMean" else 1))
    encoder.value = encoder.add("Add", encoder.value, encoder.add(op_type, encoder.value, axis))
    (report,) = Pipeline.parse("remove-padding").run(encoder.model()).reports
    assert not report.modified
    (refusal,) = report.refusals
    assert "something other than masked attention" in refusal.reason


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_and_its_cache(model_type: str, side: str, tmp_path: Path) -> None:
    species = next(each for each in GENERATORS if each.model_type == model_type)
    model, signature = lower(build(species, tmp_path / "checkpoint")).program.sole()
    Pipeline.preset("exact", "onnxruntime").run(model)
    Pipeline.parse("share-transposed-weights{minimum=1}").run(model)
    packed = model.clone()
    (report,) = Pipeline.parse("remove-padding").run(packed, [VerifyEach()]).reports
    assert report.sites
    counts = np.arange(6) < np.array([[6], [2], [4]])
    counts = counts if side == "right" else counts[:, ::-1]
    feeds = make_case(signature, {"batch": 3, "sequence": 6, PAST: 0}, np.random.default_rng(0))
    told = {"attention_mask": counts.astype(np.int64), "position_ids": positions_of(counts)}
    feeds |= {name: array for name, array in told.items() if name in feeds}
    engines = [registry.backend("onnxruntime").load(each) for each in (model, packed)]
    before, after = (engine.run(feeds) for engine in engines)
    np.testing.assert_allclose(after["logits"][counts], before["logits"][counts], rtol=1e-4, atol=1e-5)
    step = make_case(signature, {"batch": 3, "sequence": 1, PAST: 6}, np.random.default_rng(1))
    longer = np.concatenate([counts, np.ones((3, 1), bool)], axis=1)
    told = {"attention_mask": longer.astype(np.int64), "position_ids": positions_of(longer)[:, -1:]}
    step |= {name: array for name, array in told.items() if name in step}
    steps = [
        step | {f"past_key_values.{name[8:]}": kept for name, kept in found.items() if name != "logits"}
        for found in (before, after)
    ]
    before, after = (engine.run(feeds) for engine, feeds in zip(engines, steps, strict=True))
    np.testing.assert_allclose(after["logits"], before["logits"], rtol=1e-4, atol=1e-5)
