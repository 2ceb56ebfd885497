"""Rows of attention that see no key have the original's value on every target: zeros, NaN, or the mean of all values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper as nh
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Program, Provenance
from planish.optimizer.lowering.export.onnx_file import signature_of
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import VerifyEach
from planish.passes._mask_values import LOWEST, mask_values

QUERIES, KEYS = 5, 6
_QKV = "float[2,3,Q,8] q, float[2,3,K,8] k, float[2,3,K,8] v"
_FLOAT, _BOOL = "float[2,1,Q,K] m", "bool[2,1,Q,K] m"
_ZEROS = "n = IsNaN (p) z = Constant <value = float {0}> () w = Where (n, z, p)"
_MASKS = {
    "given": (_FLOAT, "mm = Identity (m)"),
    "computed": (_FLOAT, "n1 = Neg (m) mm = Neg (n1)"),
    "chosen": (_BOOL, "n1 = Not (m) n2 = Not (n1) zero = Constant <value = float {0}> () mm = Where (n2, zero, hidden)"),
    "counted": (_BOOL, "c = Cast <to = 1> (m) one = Constant <value = float {1}> () d = Sub (one, c) mm = Mul (d, hidden)"),
}  # fmt: skip


def spelled_out(mask: str, hidden: float, *, guarded: bool) -> ir.Model:
    """Attention as exporters of eager code write it; ``hidden`` stands in its mask where a key is not seen."""
    given, computed = _MASKS[mask]
    text = f"""g ({_QKV}, {given}) => (float[2,3,Q,8] r) {{
        hidden = Constant <value = float {{0}}> ()  s = Constant <value = float {{0.35}}> ()  sq = Mul (q, s)
        t = Transpose <perm = [0,1,3,2]> (k)  a = MatMul (sq, t)  {computed}  b = Add (a, mm)
        p = Softmax <axis = -1> (b)  {_ZEROS if guarded else "w = Identity (p)"}  r = MatMul (w, v) }}"""
    proto = _parsed(text)
    constant = next(node for node in proto.graph.node if node.output[0] == "hidden")
    constant.attribute[0].t.CopyFrom(nh.from_array(np.array(hidden, np.float32)))
    model: ir.Model = ir.from_proto(proto)
    return model


def one_operator(mask: str) -> ir.Model:
    flat = "m" if mask == "given" else "mm"
    twice = "" if mask == "given" else "n1 = Not (m) mm = Not (n1)"
    model: ir.Model = ir.from_proto(
        _parsed(
            f"g ({_QKV}, {_BOOL}) => (float[2,3,Q,8] r) {{ {twice} r = Attention <scale = 0.35> (q, k, v, {flat}) }}"
        )
    )
    return model


def _parsed(text: str) -> onnx.ModelProto:
    parsed = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23]>' + text)
    return onnx.shape_inference.infer_shapes(parsed)


def case(hidden: float | None) -> dict[str, np.ndarray]:
    """A text on the left of which is padding, under causal order: its first queries see no key; another without."""
    rng = np.random.default_rng(0)
    seen = np.tril(np.ones((2, 1, QUERIES, KEYS), bool), 1)
    seen[0, ..., :3] = False
    assert not seen[0, 0, :2].any()
    assert seen[0, 0, 2:].any(-1).all()
    mask = seen if hidden is None else np.where(seen, 0, hidden).astype(np.float32)
    arrays = {
        n: rng.standard_normal((2, 3, s, 8)).astype(np.float32) for n, s in (("q", QUERIES), ("k", KEYS), ("v", KEYS))
    }
    return {**arrays, "m": mask}  # fmt: skip


def as_written(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feeds)[0])


def engine_answer(target: str, model: ir.Model, feeds: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    backend = registry.backend(target)
    backend.emit(Program({"model": model}, {"model": signature_of(model)}, "", Provenance("onnx", "", {})), folder)
    return np.asarray(backend.open(folder).run(feeds)["r"])


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "bare"])
@pytest.mark.parametrize("hidden", [-np.inf, LOWEST, pytest.param(-1e9, marks=pytest.mark.breadth)])
@pytest.mark.parametrize("mask", _MASKS)
def test_a_row_that_sees_no_key(mask: str, hidden: float, guarded: bool, target: str, tmp_path: Path) -> None:
    if mask == "counted" and hidden == -np.inf:
        pytest.skip("zero times infinity is NaN everywhere")
    model = spelled_out(mask, hidden, guarded=guarded)
    feeds = case(hidden if _MASKS[mask][0] is _FLOAT else None)
    right = as_written(model, feeds)
    first = right[0, 0, 0]
    values = feeds["v"][0, 0].mean(0)
    wanted = 0 * values if guarded and hidden == -np.inf else values * np.nan if hidden == -np.inf else values
    np.testing.assert_allclose(first, wanted, atol=1e-4)  # that is what runtimes make of the file
    outcome = Pipeline.parse(presets.pipeline_text("exact", target)).run(model, [VerifyEach()])
    assert sum(len(report.sites) for report in outcome.reports if report.name == "fuse-attention") == 1
    np.testing.assert_allclose(engine_answer(target, outcome.model, feeds, tmp_path), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("mask", ["given", "computed"])
def test_a_row_that_sees_no_key_in_one_operator(mask: str, target: str, tmp_path: Path) -> None:
    """PyTorch's scaled_dot_product_attention and the standard's operator give zeros."""
    model, feeds = one_operator(mask), case(None)
    right = as_written(model, feeds)
    assert not right[0, :, :2].any()
    outcome = Pipeline.parse(presets.pipeline_text("exact", target)).run(model, [VerifyEach()])
    np.testing.assert_allclose(engine_answer(target, outcome.model, feeds, tmp_path), right, rtol=1e-4, atol=1e-4)


def test_the_runtimes_own_operator_gives_zeros_as_well() -> None:
    """MultiHeadAttention of ONNX Runtime would give NaN for minus infinity, and a mean for the lowest number."""
    text = f"""g (float[2,Q,24] q, float[2,K,24] k, float[2,K,24] v, {_BOOL}) => (float[2,Q,24] r)
        <int64[4] split = {{0, 0, 3, 8}}, int64[3] join = {{0, 0, 24}}> {{
        qs = Reshape (q, split) qh = Transpose <perm = [0,2,1,3]> (qs)  ks = Reshape (k, split)
        kh = Transpose <perm = [0,2,1,3]> (ks)  vs = Reshape (v, split)  vh = Transpose <perm = [0,2,1,3]> (vs)
        o = Attention (qh, kh, vh, m)  t = Transpose <perm = [0,2,1,3]> (o)  r = Reshape (t, join) }}"""
    model: ir.Model = ir.from_proto(_parsed(text))
    feeds = {n: a if n == "m" else a.transpose(0, 2, 1, 3).reshape(2, -1, 24) for n, a in case(None).items()}
    right = as_written(model, feeds)
    Pipeline.parse("legalize-onnxruntime{attention=multi-head}").run(model, [VerifyEach()])
    assert "MultiHeadAttention" in {node.op_type for node in model.graph}
    np.testing.assert_allclose(as_written(model, feeds), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "hidden", "holds"),
    [
        ("chosen", -np.inf, (0.0, True)),
        ("chosen", LOWEST, (LOWEST, False)),
        ("chosen", -1e4, (-1e4, False)),
        ("counted", LOWEST, (LOWEST, False)),
        ("given", 0.0, (LOWEST, True)),
        ("computed", 0.0, (LOWEST, True)),
    ],
)
def test_what_a_mask_may_hold(mask: str, hidden: float, holds: tuple[float, bool]) -> None:
    model = spelled_out(mask, hidden, guarded=False)
    held = mask_values(next(node for node in model.graph if node.outputs[0].name == "mm").outputs[0])
    assert (held.low, held.hides) == (float(np.float32(holds[0])), holds[1])


def test_two_lowest_numbers_are_minus_infinity() -> None:
    """Causal order and padding, each with the lowest number, summed: no row is hidden by what is finite."""
    text = f"g ({_FLOAT}, {_FLOAT.replace(' m', ' m2')}) => ({_FLOAT.replace(' m', ' r')}) {{ c = Max (m, low) d = Max (m2, low) r = Add (c, d) }}"
    text = text.replace("{ c", "{ low = Constant <value = float {-3.4028235e38}> () c")
    model: ir.Model = ir.from_proto(_parsed(text))
    assert mask_values(model.graph.outputs[0]).hides


_NOT_FOLLOWED = {
    "log": "mm = Log (m)",
    "quotient": "one = Constant <value = float {-1}> () mm = Div (one, m)",
    "branch": """k1 = Constant <value = bool {1}> ()
        mm = If (k1) <then_branch = a () => (float[2,1,Q,K] t1) { t1 = Log (m) },
                      else_branch = b () => (float[2,1,Q,K] t2) { t2 = Identity (m) }>""",
    "clipped": "e = Log (m) top = Constant <value = float {0}> () mm = Clip (e, , top)",
    "half": "e = Log (m) mm = Cast <to = 10> (e)",
}


def flagged(mask: str, dtype: str) -> ir.Model:
    """Attention with a mask that is computed from ones and zeros of type FLOAT, all in ``dtype`` otherwise."""
    text = f"""g ({_QKV.replace("float", dtype)}, {_FLOAT}) => ({dtype}[2,3,Q,8] r) {{
        t = Transpose <perm = [0,1,3,2]> (k)  a = MatMul (q, t)  {_NOT_FOLLOWED[mask]}  b = Add (a, mm)
        p = Softmax <axis = -1> (b)  r = MatMul (p, v) }}"""
    model: ir.Model = ir.from_proto(_parsed(text))
    return model


@pytest.mark.parametrize("mask", _NOT_FOLLOWED)
def test_a_row_that_an_operator_hides(mask: str) -> None:
    """Minus infinity comes of many operators: the row is NaN before fusion, and after it."""
    half = mask == "half"
    model, feeds = flagged(mask, "float16" if half else "float"), case(None)
    feeds = {name: array.astype(np.float16 if half else np.float32) for name, array in feeds.items()}
    feeds["m"] = feeds["m"].astype(np.float32)
    right = as_written(model, feeds)
    assert np.isnan(right[0, :, :2]).all() or mask == "clipped"  # the lowest number there: the mean
    outcome = Pipeline.parse("fuse-attention").run(model, [VerifyEach()])
    assert sum(len(report.sites) for report in outcome.reports) == 1
    np.testing.assert_allclose(
        as_written(outcome.model, feeds), right, rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-4
    )


@pytest.mark.parametrize(
    ("made", "holds"),
    [
        ("c = Constant <value = float {2}> () d = Add (c, c) e = Clip (m, c, d) r = Div (e, c)", (1.0, False)),
        ("low = Constant <value = float {-3.4028235e38}> () e = Log (m) r = Max (e, low)", (LOWEST, False)),
        ("e = MatMul (m, m) r = Tanh (e)", (-1.0, False)),
        ("r = MatMul (m, m)", (-1e30, False)),
        ("low = Constant <value = float {-1e9}> () e = Log (m) f = Clip (e, low) r = Neg (f)", (LOWEST, True)),
        (
            "i = Constant <value = int64[1,1,1,1] {0}> () u = Log (m) z = Tanh (m) r = ScatterElements (z, i, u)",
            (LOWEST, True),
        ),
        ("r = ReduceSum (m)", (LOWEST, True)),
        ("low = Constant <value = float {-1e9}> () h = Cast <to = 10> (low) r = Cast <to = 1> (h)", (-65504.0, True)),
    ],
    ids=["clip", "raised", "tanh", "product", "negated", "scattered", "sum", "half"],
)
def test_what_operators_make_of_a_mask(made: str, holds: tuple[float, bool]) -> None:
    model: ir.Model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 23]> g (float[2,1,6,6] m) => (float r) {{ {made} }}'
        )
    )
    held = mask_values(model.graph.outputs[0])
    assert (held.low, held.hides) == holds
