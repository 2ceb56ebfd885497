"""ONNX files that lie about themselves or ask for too much: the documented exit code, one line, soon."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from planish.backends.onnxruntime.engine import OnnxRuntimeEngine
from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer.compilation.references import file_reference
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.inputs import make_inputs
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.export import onnx_file
from tests.optimizer.cli.test_bad_input import BAD_INPUT, refused, run
from tests.optimizer.lowering.small_graphs import FLOAT, info, model, node, saved, well


def tensor(kind: int = FLOAT, dims: tuple[int, ...] = (2, 4), **fields: Any) -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=kind, dims=dims, **fields)


def with_weight(weight: onnx.TensorProto) -> onnx.ModelProto:
    return model(node("Add", "x w"), w=weight)


def outside(kind: int = FLOAT, **facts: str) -> onnx.TensorProto:
    made = tensor(kind, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in facts.items():
        made.external_data.add(key=key, value=value)
    return made


def function(body: onnx.NodeProto, opset: int = 23, **attributes: Any) -> onnx.FunctionProto:
    for name, value in attributes.items():
        kind = oh.make_attribute(name, value).type
        body.attribute.append(onnx.AttributeProto(name=name, type=kind, ref_attr_name=name))
    imports = [oh.make_opsetid("", opset), oh.make_opsetid("f", 1)]
    return oh.make_function("f", "made", ["a"], ["b"], [body], imports, list(attributes))


def calling(body: onnx.NodeProto, read: str = "x", opset: int = 23) -> onnx.ModelProto:
    return model(node("made", read, domain="f"), functions=(function(body, opset),))


def raw_attribute(**fields: Any) -> onnx.ModelProto:
    made = node("Cast", "x", to=1)
    made.attribute[0].CopyFrom(onnx.AttributeProto(name="to", **fields))
    return model(made)


def bytes_for(text: str, replacement: bytes) -> Callable[[], bytes]:
    return lambda: model(node("Relu", "x", name=text)).SerializeToString().replace(text.encode(), replacement)


FILES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "fewer bytes than the shape needs": (lambda: with_weight(tensor(raw_data=b"1234")), "holds 4 bytes, its type and shape [2, 4] need 32"),
    "more bytes": (lambda: with_weight(tensor(raw_data=bytes(33))), "holds 33 bytes"),
    "fewer numbers": (lambda: with_weight(tensor(float_data=[1.0])), "holds 1 entries in float_data"),
    "numbers of another type": (lambda: with_weight(tensor(onnx.TensorProto.INT8, float_data=[1.0] * 8)), "in float_data, not in int32_data alone"),
    "no element type": (lambda: with_weight(tensor(0, raw_data=b"")), "its element type is not said"),
    "an element type that is none": (lambda: with_weight(tensor(99, raw_data=b"")), "there is no element type 99"),
    "a negative size": (lambda: with_weight(tensor(dims=(-2, -4), raw_data=bytes(32))), "has a negative size"),
    "bytes of a Constant": (lambda: model(node("Constant", "", "w", value=tensor(raw_data=b"")), node("Add", "x w")), "holds 0 bytes"),
    "external of no type": (lambda: with_weight(outside(99, location="w.bin")), "there is no element type 99"),
    "external strings": (lambda: with_weight(outside(onnx.TensorProto.STRING, location="w.bin")), "strings cannot lie in external data"),
    "external name too long": (lambda: with_weight(outside(location="n" * 5000)), "cannot be looked for"),
    "external name with a slash": (lambda: with_weight(outside(location="w.bin/")), "is missing"),
    "external name with NUL": (lambda: with_weight(outside(location="a\0b")), "'a\\x00b'"),
    "external nowhere": (lambda: with_weight(outside()), "lies outside the model's folder"),
    "a function that calls itself": (lambda: calling(node("made", "a", "b", domain="f")), "its functions cannot be inlined"),
    "a function of another opset": (lambda: calling(node("Relu", "a", "b"), opset=17), "its functions cannot be inlined"),
    "a function with one input too many": (lambda: calling(node("Relu", "a", "b"), "x x"), "its functions cannot be inlined"),
    "an attribute that a function's operator does not take": (
        lambda: model(node("made", "x", domain="f", alpha="x"), functions=(function(node("LeakyRelu", "a", "b"), alpha=1.0),)),
        "attribute 'alpha' is of type STRING, takes FLOAT"),
    "an operator in a function": (lambda: calling(node("Frobnicate", "a", "b")), "ONNX has no operator 'Frobnicate'"),
    "opset 2^40": (lambda: model(opset=1 << 40), "there is no opset 1099511627776"),
    "opset -1": (lambda: model(opset=-1), "there is no opset -1"),
    "a node without name and outputs": (lambda: model(onnx.NodeProto(op_type="Relu", input=["x"])), "Relu None"),
    "a Constant with two values": (
        lambda: model(node("Constant", "", "w", value_int=1, value_float=1.0), node("Add", "x w")), "a Constant has one value"),
    "a graph that is not there": (lambda: raw_attribute(type=onnx.AttributeProto.GRAPH), "has no value of the type"),
    "an attribute of nothing": (lambda: raw_attribute(type=onnx.AttributeProto.INT, ref_attr_name="a"), "only in a function"),
    "text for integers": (lambda: model(node("Transpose", "x", perm="ab")), "attribute 'perm' is of type STRING, takes INTS"),
    "integers for one": (lambda: model(node("Softmax", "x", axis=[1])), "attribute 'axis' is of type INTS, takes INT"),
    "a number for a tensor": (lambda: model(node("ConstantOfShape", "s", "c", value=1), s=np.array([2])), "takes TENSOR"),
    "a type that is none": (lambda: model(node("Cast", "x", to=(1 << 63) - 1)), "attribute 'to' is 9223372036854775807, which is no element type"),
    "an order of axes that is none": (lambda: model(node("Transpose", "x", perm=[0, 1 << 33])), "which is no order of 2 axes"),
    "text for a type": (lambda: model(node("Cast", "x", to="x")), "attribute 'to' is of type STRING, takes INT"),
    "numbers for one": (lambda: model(node("LayerNormalization", "x w", epsilon=[1.0]), w=np.ones(4, np.float32)), "takes FLOAT"),
    "an input of strings": (lambda: model(node("Shape", "x"), inputs=(info("x", 2, kind=8),)), "input 'x': this is a tensor of STRING"),
    "an input of int4": (lambda: model(node("Shape", "x"), inputs=(info("x", 2, kind=22),)), "input 'x': this is a tensor of INT4"),
    "an input of a negative size": (lambda: model(inputs=(info("x", 2, -5),)), "no tensor has the shape"),
    "an input that is a sequence": (
        lambda: model(node("SequenceLength", "x"), inputs=(oh.make_tensor_sequence_value_info("x", FLOAT, None),)),
        "input 'x': this is no tensor but Sequence"),
    "a truth value of 147": (lambda: with_weight(tensor(onnx.TensorProto.BOOL, raw_data=bytes(7) + b"\x93")), "an entry of this BOOL is 147"),
    "a truth value of 2": (lambda: with_weight(tensor(onnx.TensorProto.BOOL, int32_data=[1, 0, 2, 1] * 2)), "an entry of this BOOL is 2"),
    "an output that is listed twice": (lambda: model(outputs=(info("y", 2, 4),) * 2), "the output 'y' is listed twice"),
    "no outputs": (lambda: model(outputs=()), "the graph has no outputs"),
    "a graph that the runtime refuses": (lambda: model(node("MatMul", "x w"), w=np.ones((3, 4), np.float32)), "ONNX Runtime"),
    "a TopK of fewer than none, which it cannot run": (
        lambda: model(node("TopK", "x k", "v i"), node("Abs", "v"), outputs=(info("y", 2, 2),), k=np.array([-(1 << 63)])), "ONNX Runtime cannot run these inputs"),
    "inputs that it cannot run": (lambda: model(node("Gather", "x i"), i=np.array([7])), "ONNX Runtime cannot run these inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    """The same line from whoever reads the file, whether or not anything is compared."""
    make, message = FILES[name]
    (tmp_path / "w.bin").write_bytes(bytes(64))
    path = saved(tmp_path, make())
    refused(BAD_INPUT, message, "opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("name", [name for name in FILES if "runtime refuses" not in name and "cannot run" not in name])
def test_bad_files_that_nobody_runs(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    (tmp_path / "w.bin").write_bytes(bytes(64))
    refused(BAD_INPUT, message, "explain", saved(tmp_path, make()), "--preset", "exact")


def test_truth_values_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8) + b"\x93" + bytes(7))
    path = saved(tmp_path, with_weight(outside(onnx.TensorProto.BOOL, location="w.bin", offset="8")))
    refused(BAD_INPUT, "an entry of this BOOL is 147", "opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_texts_inside_a_graph(tmp_path: Path) -> None:
    """They have no size that anybody knows."""
    strings = nh.from_array(np.array(["a", "bc"], dtype=object), "s")
    path = saved(
        tmp_path,
        model(
            node("StringConcat", "s s", "t"), node("StringSplit", "t", "parts counts"), node("Cast", "counts", "c", to=FLOAT),
            node("ReduceSum", "c", "n", keepdims=0), node("Mul", "x n"), s=strings,
        ),
    )  # fmt: skip
    well("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes_for("name1234", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe")())
    refused(BAD_INPUT, "is not UTF-8", "opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_escape_sequences_stay_off_the_terminal(tmp_path: Path) -> None:
    for proto in (model(node("Relu", "x", domain="\x1b[31mred")), model(node("Relu", "\x1b[31m", name="\x07"))):
        code, said = run("opt", saved(tmp_path, proto), "-o", tmp_path / "out.onnx", "--preset", "exact")
        assert code == BAD_INPUT
        assert not {"\x1b", "\x07"} & set(said)


def test_an_operator_that_the_runtime_has_in_older_opsets_only(tmp_path: Path) -> None:
    """ONNX Runtime 1.31 has no kernel for the Bernoulli of opset 22: such a file is not raised."""
    path = saved(
        tmp_path, model(node("Bernoulli", "p", "b"), node("Mul", "x b"), opset=16, p=np.ones((2, 4), np.float32))
    )
    assert "left at opset 16" in lower(path).program.provenance.notes[0]
    well("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")
    assert [each.version for each in onnx.load(tmp_path / "out.onnx").opset_import] == [16]


def test_what_the_converter_of_opsets_gets_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(proto: ir.Model, *_: object) -> tuple[str, ...]:
        next(iter(proto.graph)).op_type = "Abs"
        return ("raised from opset 13 to 23",)

    monkeypatch.setattr(onnx_file, "_upgrade", wrong)
    path = saved(tmp_path, model(opset=13))
    told = "reading the file moved its outputs (raised from opset 13 to 23)"
    refused(1, told, "opt", path, "-o", tmp_path / "o.onnx", "--preset", "exact")


def test_a_file_that_ends_the_runtime(tmp_path: Path) -> None:
    """A group of no heads is a division by zero in ONNX Runtime 1.31."""
    inputs = tuple(info(name, 1, 3, 4) for name in "qkv")
    attention = node("Attention", "q k v", q_num_heads=2, kv_num_heads=0)
    path = saved(tmp_path, model(attention, inputs=inputs, outputs=(info("y", 1, 3, 4),)))
    refused(
        BAD_INPUT,
        "does not survive this file (signal 8)",
        "opt",
        path,
        "-o",
        tmp_path / "out.onnx",
        "--preset",
        "exact",
    )


def test_a_file_may_lie_about_its_shapes(tmp_path: Path) -> None:
    """Passes believe what is written down: what inference contradicts is corrected first."""
    proto = model(
        node("Unsqueeze", "x a", "u"), node("Unsqueeze", "u a", "v"), node("Squeeze", "v b"),
        a=np.array([2]), b=np.array([2, 3]),
    )  # fmt: skip
    proto.graph.value_info.extend([info("u", 2), info("v", 2, 4)])
    values = {
        value.name: value for made in lower(saved(tmp_path, proto)).program.sole()[0].graph for value in made.outputs
    }
    assert list(values["u"].shape or ()) == [2, 4, 1]
    assert list(values["v"].shape or ()) == [2, 4, 1, 1]


@pytest.mark.parametrize("mask", [("batch", "sequence"), (1, "sequence")])
def test_an_output_may_have_another_shape_than_is_said(mask: tuple[int | str, ...], tmp_path: Path) -> None:
    """Squeeze removes every axis of one entry: the second output has no place for the mask over the tokens."""
    names = ("input_ids", "attention_mask")
    inputs = tuple(info(name, *mask, kind=onnx.TensorProto.INT64) for name in names)
    outputs = tuple(info(name, *mask, kind=onnx.TensorProto.INT64) for name in ("r", "c"))
    proto = model(
        node("Mul", "input_ids attention_mask", "r"), node("Squeeze", "r", "c"), inputs=inputs, outputs=outputs
    )
    well("opt", saved(tmp_path, proto), "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_a_graph_without_inputs_is_folded_and_not_built(tmp_path: Path) -> None:
    path = saved(tmp_path, model(node("Relu", "w"), inputs=(), w=np.ones((2, 4), np.float32)))
    well("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")
    refused(BAD_INPUT, "the graph has no inputs", "optimize", path, "-o", tmp_path / "out")


@pytest.mark.parametrize("drawn", [node("RandomNormalLike", "x", "d"), node("Dropout", "x half yes", "d")])
def test_what_draws_at_random_cannot_be_compared(drawn: onnx.NodeProto, tmp_path: Path) -> None:
    half, yes = np.array(0.5, np.float32), np.array(True)
    path = saved(tmp_path, model(drawn, node("Relu", "d"), opset=16, half=half, yes=yes))
    refused(
        BAD_INPUT, "this draws other numbers in each run", "opt", path, "-o", tmp_path / "o.onnx", "--preset", "exact"
    )


def test_two_nodes_of_one_name_are_repaired_first(tmp_path: Path) -> None:
    proto = model(node("Relu", "x", "a", name="n"), node("Neg", "a", name="n"))
    code, _ = run("opt", saved(tmp_path, proto), "-o", tmp_path / "out.onnx", "--preset", "exact")
    assert code == 0


@pytest.mark.parametrize(("inputs", "shapes"), [
    ((info("attention_mask", kind=7), info("x", 2, 4)), {"attention_mask": ()}),
    ((info("position_ids", 1, "s", kind=7), info("attention_mask", "b", "s", kind=7)), {}),
    ((info("x", "a + b", 2), info("z", "a", 2), info("w", "b", 2)), {}),
])  # fmt: skip
def test_inputs_of_unusual_shapes(
    inputs: tuple[onnx.ValueInfoProto, ...], shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """A mask without dimensions, positions for the whole batch, a sum of two axes."""
    nodes = [node("Identity", made.name, f"y{index}") for index, made in enumerate(inputs)]
    outputs = tuple(oh.make_empty_tensor_value_info(f"y{index}") for index in range(len(inputs)))
    path = saved(tmp_path, model(*nodes, inputs=inputs, outputs=outputs))
    case = make_inputs(lower(path).program.sole()[1])[0]
    assert {name: case[name].shape for name in shapes} == shapes
    if "a + b" in str(inputs):
        assert case["x"].shape[0] == case["z"].shape[0] + case["w"].shape[0]
    if "position_ids" in case:
        np.testing.assert_array_equal(case["position_ids"], [np.arange(case["attention_mask"].shape[1])])
    well("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_nothing_is_said_of_shapes_that_inference_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The runtime's own operators accept what the standard's inference does not."""
    proto = model(node("Unsqueeze", "x a", "u"), node("Squeeze", "u a"), a=np.array([2]))
    proto.graph.value_info.extend([info("u", 2)])
    well("opt", saved(tmp_path, proto), "-o", tmp_path / "out.onnx", "--preset", "exact")
    assert "Shape inference failed" not in capfd.readouterr().err


def broken(engine: str) -> Callable[..., Any]:
    """An `open` whose optimizations fail, or change what is computed."""

    class Changed(OnnxRuntimeEngine):
        def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: array + 1 for name, array in super()._run(feeds).items()}

    def opened(self: OnnxRuntime, path: Path) -> Any:
        if engine == "fails":
            raise BadInput("ONNX Runtime refuses the model: its optimizer broke it", where=path)
        ort = self._import()
        return Changed(ort, ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]))

    return opened


@pytest.mark.parametrize(
    ("engine", "told"), [("fails", "its optimizer broke it"), ("changes", "change its output 'y'")]
)
def test_a_file_that_the_runtime_breaks(
    engine: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read, compared without the runtime's optimizations, optimized, and this is said aloud."""
    path = saved(tmp_path, model(node("MatMul", "x w"), w=np.ones((4, 4), np.float32)))
    monkeypatch.setattr(OnnxRuntime, "open", broken(engine))
    lowered = lower(path)
    with caplog.at_level(logging.WARNING, "planish"):
        reference = file_reference(lowered)
    assert told in caplog.text
    assert told in reference.origin
    assert reference.noise["y"] < 1e-5  # not what the runtime makes of it
    assert run("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")[0] == 0


def gated() -> onnx.ModelProto:
    """A gated layer as torch writes chunk: a sequence inside, tensors at the border."""
    nodes = [
        node("SplitToSequence", "x half", "s", axis=-1), node("SequenceAt", "s i", "a"), node("SequenceAt", "s j", "b"),
        node("Sigmoid", "b", "c"), node("Mul", "a c"),
    ]  # fmt: skip
    return model(*nodes, outputs=(info("y", 2, 2),), half=np.array(2), i=np.array(0), j=np.array(1))


def optional() -> onnx.ModelProto:
    return model(node("Optional", "x", "o"), node("OptionalGetElement", "o", "e"), node("Neg", "e"))


@pytest.mark.parametrize(
    ("make", "right"),
    [(gated, lambda x: x[:, :2] / (1 + np.exp(-x[:, 2:]))), (optional, lambda x: -x)],
    ids=["sequence", "optional"],
)
def test_values_that_are_no_tensors_pass_through(
    make: Callable[[], onnx.ModelProto], right: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    well("opt", saved(tmp_path, make()), "-o", tmp_path / "out.onnx", "--preset", "exact")
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    given = OnnxRuntime().open(tmp_path / "out.onnx").run({"x": x})
    np.testing.assert_allclose(given["y"], right(x), rtol=1e-6)


def test_an_output_that_is_a_sequence_is_refused_by_name(tmp_path: Path) -> None:
    sequence = oh.make_tensor_sequence_value_info("s", FLOAT, None)
    path = saved(tmp_path, model(node("SplitToSequence", "x", "s"), outputs=(sequence,)))
    refused(
        BAD_INPUT,
        "output 's': this is no tensor but Sequence",
        "opt",
        path,
        "-o",
        tmp_path / "out.onnx",
        "--preset",
        "exact",
    )
