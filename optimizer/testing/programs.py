"""Small programs that backends are checked with: an encoder, and a decoder that keeps a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx.reference
import onnx_ir as ir

from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Arrays, Axis, Program, Provenance, Role, Signature, TensorSpec

VOCABULARY = 16
_HEADS, _SIZE, _WIDTH = 2, 4, 8

_ENCODER = """<ir_version: 10, opset_import: ["" : 23]>
encoder (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
    => (float[batch, sequence, 8] last_hidden_state) <CONSTANTS> {
  embedded = Gather (table, input_ids)
  product = MatMul (embedded, weight)
  values = Add (product, bias)
  keys = Transpose <perm = [0, 2, 1]> (embedded)
  scores = MatMul (embedded, keys)
  masks = Unsqueeze (attention_mask, one)
  counts = Cast <to = 9> (masks)
  masked = Where (counts, scores, lowest)
  shares = Softmax <axis = -1> (masked)
  mixed = MatMul (shares, values)
  last_hidden_state = Tanh (mixed)
}"""

_DECODER = """<ir_version: 10, opset_import: ["" : 23]>
decoder (
    int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
    float[batch, 2, past, 4] "past_key_values.0.key", float[batch, 2, past, 4] "past_key_values.0.value"
) => (
    float[batch, sequence, 16] logits, float[batch, 2, total, 4] "present.0.key",
    float[batch, 2, total, 4] "present.0.value"
) <CONSTANTS> {
  embedded = Gather (table, input_ids)
  q = MatMul (embedded, query)
  k = MatMul (embedded, key)
  v = MatMul (embedded, value)
  q4 = Reshape (q, heads)
  k4 = Reshape (k, heads)
  v4 = Reshape (v, heads)
  queries = Transpose <perm = [0, 2, 1, 3]> (q4)
  keys = Transpose <perm = [0, 2, 1, 3]> (k4)
  values = Transpose <perm = [0, 2, 1, 3]> (v4)
  "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", keys)
  "present.0.value" = Concat <axis = 2> ("past_key_values.0.value", values)
  turned = Transpose <perm = [0, 1, 3, 2]> ("present.0.key")
  scores = MatMul (queries, turned)
  all = Shape <start = 1, end = 2> (attention_mask)
  new = Shape <start = 1, end = 2> (input_ids)
  old = Sub (all, new)
  all0 = Squeeze (all)
  old0 = Squeeze (old)
  zero0 = Squeeze (zero)
  step = Squeeze (one)
  columns = Range (zero0, all0, step)
  rows = Range (old0, all0, step)
  row = Unsqueeze (rows, one)
  causal = LessOrEqual (columns, row)
  masks = Unsqueeze (attention_mask, inner)
  counts = Cast <to = 9> (masks)
  seen = And (counts, causal)
  masked = Where (seen, scores, lowest)
  shares = Softmax <axis = -1> (masked)
  mixed = MatMul (shares, "present.0.value")
  merged = Transpose <perm = [0, 2, 1, 3]> (mixed)
  flat = Reshape (merged, width)
  logits = MatMul (flat, head)
}"""


def encoder() -> Program:
    """Tokens to hidden states, (batch, sequence, 8): a product, a mask and an attention over the sequence."""
    draw = np.random.default_rng(0).standard_normal
    constants: dict[str, np.ndarray] = {
        "table": draw((VOCABULARY, _WIDTH)).astype(np.float32),
        "weight": draw((_WIDTH, _WIDTH)).astype(np.float32),
        "bias": draw(_WIDTH).astype(np.float32),
        "lowest": np.array([-1e9], np.float32),
        "one": np.array([1], np.int64),
    }
    outputs = (TensorSpec("last_hidden_state", ir.DataType.FLOAT, ("batch", "sequence", _WIDTH), Role.HIDDEN),)
    signature = Signature(_texts("sequence"), outputs, {name: Axis(name, 1, 64) for name in ("batch", "sequence")})
    return Program(
        {"model": _model(_ENCODER, constants, signature)},
        {"model": signature},
        "feature-extraction",
        Provenance("onnx", "encoder"),
    )


def decoder() -> Program:
    """Tokens to scores of the next one, (batch, sequence, 16), behind a cache of one layer of two heads."""
    draw = np.random.default_rng(1).standard_normal
    weights = {name: draw((_WIDTH, _WIDTH)).astype(np.float32) for name in ("query", "key", "value")}
    constants: dict[str, np.ndarray] = {
        **weights,
        "table": draw((VOCABULARY, _WIDTH)).astype(np.float32),
        "head": draw((_WIDTH, VOCABULARY)).astype(np.float32),
        "heads": np.array([0, -1, _HEADS, _SIZE], np.int64),
        "width": np.array([0, -1, _WIDTH], np.int64),
        "one": np.array([1], np.int64),
        "inner": np.array([1, 2], np.int64),
        "zero": np.array([0], np.int64),
        "lowest": np.array([-1e9], np.float32),
    }
    total = f"{PAST} + sequence"
    inputs = (*_texts(total), *(_cache(f"past_key_values.0.{kind}", PAST) for kind in ("key", "value")))
    scores = TensorSpec("logits", ir.DataType.FLOAT, ("batch", "sequence", VOCABULARY), Role.LOGITS)
    outputs = (scores, *(_cache(f"present.0.{kind}", total) for kind in ("key", "value")))
    axes = {"batch": Axis("batch", 1, 64), "sequence": Axis("sequence", 1, 64), PAST: Axis(PAST, 0, 63)}
    signature = Signature(inputs, outputs, axes)
    return Program(
        {"model": _model(_DECODER, constants, signature)},
        {"model": signature},
        "text-generation",
        Provenance("onnx", "decoder"),
    )


def tokens(batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Texts of a batch; all but the first are padded at their end where they are long enough."""
    ids = np.random.default_rng(batch * 100 + sequence).integers(0, VOCABULARY, (batch, sequence))
    mask = np.ones((batch, sequence), np.int64)
    mask[1:, max(1, sequence - 1) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def expected(program: Program, cases: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """Outputs of the reference evaluator of ONNX."""
    model, _ = program.sole()
    evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
    names = [value.name or "" for value in model.graph.outputs]
    return [dict(zip(names, evaluator.run(names, dict(case)), strict=True)) for case in cases]


def _texts(masked: str) -> tuple[TensorSpec, ...]:
    ids = TensorSpec("input_ids", ir.DataType.INT64, ("batch", "sequence"), Role.TOKENS, VOCABULARY)
    return ids, TensorSpec("attention_mask", ir.DataType.INT64, ("batch", masked), Role.MASK)


def _cache(name: str, length: str) -> TensorSpec:
    return TensorSpec(name, ir.DataType.FLOAT, ("batch", _HEADS, length, _SIZE), Role.CACHE)


def _model(text: str, constants: Arrays, signature: Signature) -> ir.Model:
    """The graph in a text, with its constants, and with the shapes that the signature has."""
    declared = [
        f"{ir.DataType.from_numpy(array.dtype).name.lower()}{list(array.shape)} {name} = "
        f"{{{', '.join(map(str, array.ravel().tolist()))}}}"
        for name, array in constants.items()
    ]
    model = ir.from_onnx_text(text.replace("CONSTANTS", ", ".join(declared)))
    specs = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(specs[value.name or ""].shape)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    return model
