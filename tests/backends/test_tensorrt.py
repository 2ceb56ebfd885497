"""TensorRT: the folder that any machine can write, and what is said where it cannot run."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from planish.optimizer import Pipeline, optimize
from planish.optimizer.errors import CheckFailed, MissingRuntime
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Program
from planish.optimizer.lowering import lower
from tests.backends.conftest import contents
from tests.train import MODELS as TRAINED
from tests.zoo import GENERATORS, build


def test_the_graph_holds_standard_operators_of_one_float_type(program: Program, tmp_path: Path) -> None:
    registry.backend("tensorrt").emit(program, tmp_path)
    assert set(contents(tmp_path)) == {"model.onnx", "model.onnx.data", "build.json", "build.py"}
    model = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version <= 24) for entry in model.opset_import] == [("", True)]
    types = {tensor.data_type for tensor in model.graph.initializer} - {onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    assert types == {onnx.TensorProto.FLOAT}
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_profiles_follow_from_the_signature(program: Program, tmp_path: Path) -> None:
    registry.backend("tensorrt{batch=[1,2,4] sequence=[8,16,999]}").emit(program, tmp_path)
    settings = json.loads((tmp_path / "build.json").read_text())
    assert settings["strongly_typed"] is True
    (profile,) = settings["profiles"]
    longest = program.sole()[1].axes["sequence"].maximum
    assert longest == 48  # the position table of the model, not what was asked for
    assert set(profile) == {tensor.name for tensor in program.sole()[1].inputs}
    for shapes in profile.values():
        assert shapes == {"min": [1, 8], "opt": [2, 16], "max": [4, longest]}


def test_the_script_that_builds_stands_alone(program: Program, tmp_path: Path) -> None:
    registry.backend("tensorrt").emit(program, tmp_path)
    tree = ast.parse((tmp_path / "build.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "tensorrt" in modules
    assert not any(name.startswith("planish") for name in modules)


def test_what_its_parser_refuses_is_refused_here(program: Program, tmp_path: Path) -> None:
    quantized = Pipeline.parse("quantize-int8{minimum=1}").run(program.sole()[0].clone())
    with pytest.raises(CheckFailed, match="TensorRT has no operator"):
        registry.backend("tensorrt").emit(replace(program, components={"model": quantized.model}), tmp_path)


def test_opening_says_what_is_missing(program: Program, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("the TensorRT runtime is installed here")
    registry.backend("tensorrt").emit(program, tmp_path)
    with pytest.raises(MissingRuntime, match="the TensorRT runtime is not installed") as caught:
        registry.backend("tensorrt").open(tmp_path)
    assert "build.py" in str(caught.value)
    assert caught.value.exit_code == 4


def generator(name: str, folder: Path) -> Program:
    species = next(species for species in GENERATORS if species.model_type == name)
    return lower(build(species, folder / "checkpoint")).program


def test_a_past_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    registry.backend("tensorrt").emit(generator("gpt2", tmp_path), tmp_path / "out")
    (profile,) = json.loads((tmp_path / "out" / "build.json").read_text())["profiles"]
    assert profile["past_key_values.0.key"] == {"min": [1, 3, 0, 8], "opt": [1, 3, 47, 8], "max": [8, 3, 47, 8]}
    assert profile["attention_mask"]["min"] == [1, 1]


@pytest.mark.slow
def test_several_components_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="engines of one component, this program has 3"):
        registry.backend("tensorrt").emit(generator("t5", tmp_path), tmp_path)


@pytest.mark.breadth
@pytest.mark.parametrize("preset", ["fast", "small"])
def test_data_give_integers_that_meet_their_product_in_float16(preset: str, tmp_path: Path) -> None:
    texts = [f"Return the {word} of the list." for word in ("length", "sum", "end", "name", "path", "first item")]
    built = optimize(
        TRAINED / "writer", tmp_path / "out", targets=["tensorrt"], preset=preset, calibration=texts * 12, keep=["kl<=0.05"]
    )  # fmt: skip
    graph = ir.load(built.folder / "tensorrt" / "model.onnx").graph
    operands = [[v.producer() for v in node.inputs if v is not None] for node in graph if node.op_type == "MatMul"]
    integer = [pair for pair in operands if all(one is not None and one.op_type == "DequantizeLinear" for one in pair)]
    assert len(integer) > 12
    assert {one.inputs[1].dtype for pair in integer for one in pair if one and one.inputs[1]} == {ir.DataType.FLOAT16}
    signs = {one.inputs[0].dtype for pair in integer for one in pair if one and one.inputs[0]}
    assert signs == {ir.DataType.INT8}
