"""Valid graphs that mutations start from: small, and together of every kind of value and node that a file may hold."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx
import onnx.parser

from tests import exporters, golden

_LAYER = """g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask) => (float[batch,sequence,8] logits)
<float[16,8] table = {%s}, float[8,8] wq = {%s}, float[8,8] wk = {%s}, float[8,8] wv = {%s}, float[8,12] up = {%s},
 float[12,8] down = {%s}, float[8] gain = {1,1,1,1,1,1,1,1}, float[8] bias = {0,0,0,0,0,0,0,0}, float one = {1},
 float far = {-1000}, float scale = {0.5}, int64[4] heads = {0,0,2,4}, int64[3] whole = {0,0,8}, int64[2] axes = {1,2}>
{ h = Gather (table, input_ids)
  q0 = MatMul (h, wq) q1 = Reshape (q0, heads) q = Transpose <perm = [0,2,1,3]> (q1)
  k0 = MatMul (h, wk) k1 = Reshape (k0, heads) k = Transpose <perm = [0,2,3,1]> (k1)
  v0 = MatMul (h, wv) v1 = Reshape (v0, heads) v = Transpose <perm = [0,2,1,3]> (v1)
  s0 = MatMul (q, k) s1 = Mul (s0, scale)
  m0 = Cast <to = 1> (attention_mask) m1 = Sub (one, m0) m2 = Mul (m1, far) m = Unsqueeze (m2, axes)
  s2 = Add (s1, m) p = Softmax <axis = -1> (s2) c0 = MatMul (p, v) c1 = Transpose <perm = [0,2,1,3]> (c0)
  c = Reshape (c1, whole) r = Add (h, c) n = LayerNormalization <axis = -1, epsilon = 0.00001> (r, gain, bias)
  u0 = MatMul (n, up) u = Gelu (u0) d = MatMul (u, down) logits = Add (n, d) }"""


def _numbers(count: int, step: int) -> str:
    return ",".join(str((index * step % 17 - 8) / 16) for index in range(count))


def _layer() -> str:
    return _LAYER % tuple(_numbers(n, s) for n, s in ((128, 3), (64, 5), (64, 7), (64, 11), (96, 13), (96, 6)))


_TEXTS = (
    _layer(),
    "g (float[2,4] x) => (float[2,2] y) <int64 size = {2}, int64 i = {0}, int64 j = {1}> { s = SplitToSequence <axis = -1>"
    " (x, size) a = SequenceAt (s, i) b = SequenceAt (s, j) c = Sigmoid (b) y = Mul (a, c) }",
    "g (float[2,4] x) => (seq(float[2,2]) s) <int64 size = {2}> { s = SplitToSequence <axis = -1> (x, size) }",
    "g (float[2,4] x) => (float[2,4] y) { o = Optional (x) e = OptionalGetElement (o) y = Relu (e) }",
    "g (float[2,4] x, bool c) => (float[2,4] y) { y = If (c) <then_branch = a () => (float[2,4] t) { t = Relu (x) },"
    " else_branch = b () => (float[2,4] e) { e = Neg (x) }> }",
    "g (float[2] x) => (float[2] y, float[n,2] z) <int64 rounds = {3}, bool go = {1}> { y, z = Loop <body ="
    " b (int64 i, bool c, float[2] a) => (bool d, float[2] e, float[2] f) { d = Identity (c) e = Add (a, a) f = Relu (e) }> (rounds, go, x) }",
    "g (float[3,2] x) => (float[2] y, float[3,2] z) <float[2] zero = {0,0}> { y, z = Scan <num_scan_inputs = 1,"
    " body = b (float[2] a, float[2] s) => (float[2] e, float[2] f) { e = Add (a, s) f = Identity (e) }> (zero, x) }",
    "g (float[batch,4] x) => (float[batch,n] y) <int64 start = {0}, int64 end = {6}, int64 step = {1}, int64[1] one = {1}>"
    " { r = Range (start, end, step) t = Tile (r, one) s = Shape (t) z = ConstantOfShape (s) f = Cast <to = 1> (t)"
    " w = Add (f, z) u = Unsqueeze (w, one) v = Expand (u, s) k = ReduceSum <keepdims = 1> (x, one) y = Mul (k, w) }",
    "g (float[a,b,4] x) => (float[a,b,4] y) <int64 i = {0}, int64[1] four = {4}, int64[1] m = {-1}> { s = Shape (x)"
    " d = Gather (s, i) z = Constant <value_ints = [0]> () d1 = Unsqueeze (d, z) t = Concat <axis = 0> (d1, m, four)"
    " y = Reshape (x, t) }",
    "g (float[1,3,8,8] x) => (float[1,2,4,4] y) <float[2,3,3,3] w = {%s}, float[2] b = {0.1,-0.1}> { c = Conv"
    " <kernel_shape = [3,3], pads = [1,1,1,1]> (x, w, b) r = Relu (c) y = MaxPool <kernel_shape = [2,2], strides = [2,2]>"
    " (r) }".replace("%s", _numbers(54, 5)),
    "g (float[2,4] x) => (float[2,4] y) <float[4,4] w = {%s}, float[4] b = {1,2,3,4}> { a = Gemm <transB = 1> (x, w, b)"
    " c = Clip (a) q, s, z = DynamicQuantizeLinear (c) y = DequantizeLinear (q, s, z) }".replace("%s", _numbers(16, 3)),
    "g (string[2] x) => (string[2] y) { y = Identity (x) }",
    "g (float16[2,4] x) => (double[2,4] y, int8[2,4] z) { y = Cast <to = 11> (x) z = Cast <to = 3> (y) }",
    "g (float[2,4] x) => (float[2,2] v, int64[2,2] i) <int64[1] k = {2}> { v, i = TopK (x, k) }",
)  # fmt: skip
_FUNCTION = """<ir_version: 10, opset_import: ["" : 23, "f" : 1]>
g (float[2,4] x) => (float[2,4] y) { a = f.twice <factor = 2.0> (x) y = f.twice (a) }
<domain: "f", opset_import: ["" : 23]> twice <factor: float = 3.0> (x) => (y) {
  k = Constant <value_float: float = @factor> () y = Mul (x, k) }"""


def _read(text: str) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.parser.parse_model(text)
    return model


@functools.cache
def small() -> list[onnx.ModelProto]:
    """Graphs of a few nodes: those above, and the golden cases of all passes."""
    header = '<ir_version: 10, opset_import: ["" : 23]>'
    return [
        *(_read(header + text) for text in _TEXTS),
        _read(_FUNCTION),
        *(_proto(case) for case in golden.read_cases()),
    ]


def _proto(case: golden.Case) -> onnx.ModelProto:
    opset = case.settings.get("opset", "23")
    return _read(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>{case.graph}')


@functools.cache
def exported() -> list[Callable[[], onnx.ModelProto]]:
    """Whole tiny Transformers as exporters of several years wrote them."""
    files = [content for _, content in exporters.stored() if len(content) < 100_000]
    return [functools.partial(onnx.load_model_from_string, content) for content in files]
