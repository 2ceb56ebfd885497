"""Time and work of single operators, by the counters of each runtime."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.backends.onnxruntime.counters import _Event, _operator
from planish.backends.openvino.counters import _FIRST_CALLS, _of_last_calls
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
    assert not backend.has_counters
    assert not registry.backend("openvino{device=GPU}").has_counters
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
    (loop,) = [each for each in times if each.kind == "Loop"]
    assert loop.multiply_adds == 5 * 4**3
    assert "MatMul" not in [each.kind for each in times]


def _run(text: str, target: str, folder: Path, **inputs: np.ndarray) -> list[OperatorTime]:
    return registry.backend(target).operator_times(_emitted(target, ir.from_onnx_text(text), folder), inputs, 3)


@pytest.mark.parametrize("target", CPU)
def test_products_in_a_row_are_counted_apart(target: str, tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[6,8] x, float[8,16] u, float[16,4] v) => (float[6,4] y) {
        h = MatMul (x, u)
        y = MatMul (h, v)
    }
    """
    shapes = {"x": (6, 8), "u": (8, 16), "v": (16, 4)}
    times = _run(text, target, tmp_path, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    found = sorted(each.multiply_adds for each in times if each.multiply_adds)
    assert found == [6 * 16 * 4, 6 * 8 * 16]


def test_a_transposed_left_operand_and_one_of_another_type(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (double[3,5] x, double[3,7] w) => (double[5,7] y) {
        y = Gemm <transA = 1> (x, w)
    }
    """
    inputs = {"x": np.ones((3, 5)), "w": np.ones((3, 7))}
    (found,) = [each for each in _run(text, "onnxruntime", tmp_path, **inputs) if each.multiply_adds]
    assert (found.multiply_adds, found.arithmetic, found.weight_bytes) == (3 * 5 * 7, "f64", 0)


def test_operators_that_multiply_and_are_not_counted_say_so(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[3,5] x, float[5,7] w) => (float[3,7] y) {
        y = Einsum <equation = "ij,jk->ik"> (x, w)
    }
    """
    inputs = {"x": np.ones((3, 5), np.float32), "w": np.ones((5, 7), np.float32)}
    assert "Einsum (products not counted)" in [each.kind for each in _run(text, "onnxruntime", tmp_path, **inputs)]


def test_a_convolution_whose_weights_are_packed_says_that_it_is_not_counted() -> None:
    image, weights = (1, 3, 8, 8), (4, 3, 1, 1)
    packed = _Event("c", "Conv", 0, 5, "float", (image,), ((1, 4, 8, 8),), 0, 0)
    told = replace(packed, inputs=(image, weights))
    assert _operator([packed], 1, {}).kind == "Conv (products not counted)"
    assert (_operator([told], 1, {}).kind, _operator([told], 1, {}).multiply_adds) == ("Conv", 4 * 8 * 8 * 3)


def test_sizes_that_depend_on_values_leave_a_row_of_their_own(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[6,8] x, float[8,4] w, bool[6] kept) => (float[n,4] y) {
        some = Compress <axis = 0> (x, kept)
        y = MatMul (some, w)
    }
    """
    kept = np.array([True, False] * 3)
    inputs = {"x": np.ones((6, 8), np.float32), "w": np.ones((8, 4), np.float32), "kept": kept}
    assert "products without a counter" in [e.kind for e in _run(text, "openvino", tmp_path, **inputs)]


def test_first_calls_are_kept_out_of_means_over_all_calls() -> None:
    slow, calls = 90.0, 20
    mean = (slow + 2.0 * (_FIRST_CALLS - 1 + calls)) / (_FIRST_CALLS + calls)
    first = (slow + 2.0 * (_FIRST_CALLS - 1)) / _FIRST_CALLS
    assert _of_last_calls({"a": first}, {"a": mean}, calls) == {"a": pytest.approx(2.0)}


def test_the_preset_fast_says_how_activations_are_grouped(tmp_path: Path) -> None:
    """Through clones, legalization and folding, and again from the lock."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    checkpoint = build(Species("bert", "feature-extraction", sizes), tmp_path / "checkpoint")
    lock = tmp_path / "engine.lock"
    for name in ("out", "again"):
        out, keep = tmp_path / name, "cosine>=0.9"
        optimize(checkpoint, out, targets=("openvino",), preset="fast", keep=keep, lock=lock, clock=all_faster)
        file = (tmp_path / name / "openvino" / "openvino_model.xml").read_text()
        assert '<DYNAMIC_QUANTIZATION_GROUP_SIZE value="64"' in file
