"""Time and work of single operators, by the counters of each runtime."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.inputs import sized_case
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.counters import OperatorTime, Probe, product
from planish.optimizer.ir.program import Program, Provenance, Signature
from planish.optimizer.output.manifest import Manifest
from tests.backends.test_onnxruntime import FEEDS
from tests.clocks import all_faster
from tests.zoo import COMMON, Species, build

CPU = ("onnxruntime", "openvino{precision=f32}")
ROWS, WIDTH = 48, 64


def _emitted(target: str, model: ir.Model, folder: Path) -> Path:
    program = Program({"model": model}, {"model": Signature((), ())}, "", Provenance("onnx", "test"))
    registry.backend(target).emit(program, folder)
    return folder


def _adds(times: list[OperatorTime]) -> int:
    return sum(each.multiply_adds for each in times)


@pytest.mark.parametrize("target", CPU)
def test_a_product_is_counted_exactly(target: str, tmp_path: Path) -> None:
    folder = _emitted(target, product(ROWS, WIDTH, Probe("f32", target)), tmp_path)
    times = registry.backend(target).operator_times(folder, {"x": np.ones((ROWS, WIDTH), np.float32)}, 3)
    (found,) = [each for each in times if each.multiply_adds]
    assert found.multiply_adds == ROWS * WIDTH * WIDTH
    assert found.weight_bytes == 4 * WIDTH * WIDTH
    assert found.activation_bytes == 4 * 2 * ROWS * WIDTH
    assert found.arithmetic == "f32"
    assert found.milliseconds > 0


@pytest.mark.parametrize(("target", "operator"), [("onnxruntime", "MatMulInteger"), ("openvino", "MatMul")])
def test_a_product_in_8_bits_reads_weights_of_one_byte(target: str, operator: str, tmp_path: Path) -> None:
    folder = _emitted(target, product(ROWS, WIDTH, Probe("i8", target, operator)), tmp_path)
    times = registry.backend(target).operator_times(folder, {"x": np.ones((ROWS, WIDTH), np.float32)}, 3)
    (found,) = [each for each in times if each.multiply_adds]
    assert (found.arithmetic, found.multiply_adds) == ("i8", ROWS * WIDTH * WIDTH)
    assert found.weight_bytes - WIDTH * WIDTH in range(9)  # a scale may lie beside them


@pytest.mark.parametrize("target", CPU)
def test_everything_that_an_encoder_multiplies_is_found(target: str, program: Program, tmp_path: Path) -> None:
    registry.backend(target).emit(program, tmp_path)
    times = registry.backend(target).operator_times(tmp_path, FEEDS, 3)
    layers, width, inner = (COMMON[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    batch, tokens = FEEDS["input_ids"].shape
    rows = batch * tokens
    projections, attention = rows * width * (4 * width + 2 * inner), 2 * rows * tokens * width
    assert _adds(times) == layers * (projections + attention)
    assert not [each for each in times if "without" in each.kind]


def test_a_step_of_a_decoder_is_counted_with_its_cache(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    checkpoint = build(Species("llama", "text-generation", sizes), tmp_path / "checkpoint")
    found: dict[int, list[int]] = defaultdict(list)
    for target, last in zip(CPU, (",use-matmul-nbits", ""), strict=True):  # OpenVINO keeps the cache inside
        out, passes = tmp_path / target, "pack-projections,quantize-weights{bits=4 block=32}" + last
        optimize(checkpoint, out, targets=target, pipeline=passes, keep="cosine>=0", clock=all_faster)
        signature = Manifest.read(out).signatures["model"].signature()
        for past in (0, 40):
            case, _ = sized_case(signature, {"batch": 1, "sequence": 1, "past": past})
            backend = registry.backend(target)
            times = backend.operator_times(out / backend.name, case, 3)
            found[past].append(_adds(times))
            # Weights of 4 bits, in OpenVINO with a scale of 32 bits for each 32 of them; the head is in 8 bits.
            packed = [e.weight_bytes / e.multiply_adds for e in times if 0 < e.weight_bytes < e.multiply_adds]
            assert len(packed) >= 8
            assert set(packed) <= {0.5, 0.625}
    layers, width = 2, 64
    assert len(set(found[0])) == len(set(found[40])) == 1  # both runtimes multiply the same
    assert found[40][0] - found[0][0] == layers * 2 * 40 * width  # queries by keys, probabilities by values


def test_a_backend_without_counters_says_so(tmp_path: Path) -> None:
    backend = registry.backend("tensorrt")
    assert not backend.has_counters()
    with pytest.raises(BadInput, match="target tensorrt tells no time of single operators"):
        backend.operator_times(tmp_path, {}, 1)


def test_operators_inside_a_loop_are_part_of_it(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4,4] x) => (float[4,4] y) {
        count = Constant <value = int64 {5}> ()
        on = Constant <value = bool {1}> ()
        y = Loop (count, on, x) <body = b (int64 i, bool go, float[4,4] s) => (bool more, float[4,4] t) {
            more = Identity (go)
            t = MatMul (s, s)
        }>
    }
    """
    model = ir.from_onnx_text(text)
    folder = _emitted("onnxruntime", model, tmp_path)
    times = registry.backend("onnxruntime").operator_times(folder, {"x": np.ones((4, 4), np.float32)}, 3)
    kinds = [each.kind for each in times]
    assert "Loop" in kinds
    assert "MatMul" not in kinds
