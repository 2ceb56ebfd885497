"""Bisection finds the pass, the site, and cuts out a few nodes that fail by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from planish.optimizer import Pass, PassResult, optimize
from planish.optimizer.driver.bisect import bisect
from planish.optimizer.driver.opt import OptOptions, optimize_file
from planish.optimizer.errors import BadInput, CheckFailed
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.pass_base import admitted
from planish.optimizer.ir.graph import location_of, scalar_of
from planish.passes import PASSES
from tests.clocks import all_faster

BLOCKS, WRONG = 24, 17
"""Blocks of the model, and the one whose rewriting is wrong."""


@dataclass(frozen=True)
class AddBySubtracting(Pass):
    """Write x + c as x - (-c), and get the sign wrong where c is the constant of one block."""

    name: ClassVar[str] = "add-by-subtracting"

    def call(self, model: ir.Model) -> PassResult:
        sites = []
        for node in [node for node in model.graph if node.op_type == "Add"]:
            number = scalar_of(node.inputs[1])
            if number is None or not admitted():
                continue
            sites.append(location_of(node))
            sign = 1 if number == WRONG / 64 else -1
            constant = ir.tensor(np.array(sign * number, np.float32), name=f"{node.outputs[0].name}_constant")
            value = ir.Value(
                name=constant.name, shape=ir.Shape([]), type=ir.TensorType(constant.dtype), const_value=constant
            )
            model.graph.register_initializer(value)
            node.op_type = "Sub"
            node.replace_input_with(1, value)
        return PassResult(model, bool(sites), sites=sites)


@dataclass(frozen=True)
class BreakDown(Pass):
    """Raise an error at the third Tanh."""

    name: ClassVar[str] = "break-down"

    def call(self, model: ir.Model) -> PassResult:
        sites: list[str] = []
        for node in [node for node in model.graph if node.op_type == "Tanh"]:
            if not admitted():
                break
            if len(sites) == 2:
                raise KeyError("a table has no entry")
            node.metadata_props["visited"] = "yes"
            sites.append(location_of(node))
        return PassResult(model, modified=False, sites=sites)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for cls in (AddBySubtracting, BreakDown):
        monkeypatch.setitem(PASSES, cls.name, f"{__name__}:{cls.__name__}")
    registry.table.cache_clear()
    yield
    registry.table.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Blocks of a product, a constant that goes with their number, and a tangent."""
    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for block in range(BLOCKS):
        weights += [nh.from_array((rng.normal(size=(4, 4)) / 2).astype(np.float32), f"w{block}")]
        weights += [nh.from_array(np.array(block / 64, np.float32), f"c{block}")]
        nodes += [
            oh.make_node("MatMul", [x, f"w{block}"], [f"p{block}"], name=f"product_{block}"),
            oh.make_node("Add", [f"p{block}", f"c{block}"], [f"a{block}"], name=f"sum_{block}"),
            oh.make_node("Tanh", [f"a{block}"], [f"t{block}"], name=f"tangent_{block}"),
        ]
        x = f"t{block}"
    nodes.append(oh.make_node("Neg", [x], ["y"], name="last"))
    borders = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    made = oh.make_model(
        oh.make_graph(nodes, "g", borders[:1], borders[1:], weights),
        opset_imports=[oh.make_opsetid("", 23)],
        ir_version=10,
    )
    path = tmp_path / "in.onnx"
    onnx.save(made, path)
    return path


@pytest.mark.slow
def test_the_pass_and_the_site_are_found_and_cut_out(model: Path, tmp_path: Path) -> None:
    pipeline = "fold-constants,eliminate-identities,add-by-subtracting,remove-unused-nodes"
    found = bisect(model, pipeline, tmp_path / "found.onnx")
    assert found is not None
    assert found.text == "add-by-subtracting"
    assert found.site == f"Add 'sum_{WRONG}'"
    assert found.runs <= 2 + int(np.log2(BLOCKS))
    repro = onnx.load(tmp_path / "found.onnx")
    assert len(repro.graph.node) == found.nodes <= 10
    with pytest.raises(CheckFailed, match="add-by-subtracting moved the outputs"):
        optimize_file(tmp_path / "found.onnx", tmp_path / "after.onnx", OptOptions(pipeline=found.text))


@pytest.mark.slow
def test_the_command_line_says_what_was_found(model: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from planish.optimizer.cli.bisect_command import command

    arguments = [str(model), "--pipeline", "add-by-subtracting", "-o", str(tmp_path / "found.onnx")]
    done = CliRunner().invoke(command, arguments)
    assert isinstance(done.exception, CheckFailed)
    assert f"site       Add 'sum_{WRONG}'" in done.output
    assert f"planish opt {tmp_path / 'found.onnx'} --pipeline 'add-by-subtracting'" in done.output
    assert json.loads(CliRunner().invoke(command, [*arguments, "--json"]).output)["site"] == f"Add 'sum_{WRONG}'"


@pytest.mark.slow
def test_a_pass_that_raises_is_found_too(model: Path, tmp_path: Path) -> None:
    found = bisect(model, "break-down", tmp_path / "found.onnx")
    assert found is not None
    assert (found.text, found.site) == ("break-down", "number 3")
    assert found.violations == ("KeyError: 'a table has no entry'",)
    assert (tmp_path / "found.onnx").is_file()


def test_nothing_is_made_where_nothing_fails(model: Path, tmp_path: Path) -> None:
    assert bisect(model, "fold-constants,eliminate-identities", tmp_path / "found.onnx") is None
    assert not (tmp_path / "found.onnx").exists()


@pytest.mark.slow
def test_a_pass_that_is_not_exact_is_held_against_what_is_asked(model: Path, tmp_path: Path) -> None:
    pipeline = "quantize-int8{minimum=1}"
    assert bisect(model, pipeline, tmp_path / "wide.onnx", keep=["cosine>=0.5"]) is None
    found = bisect(model, pipeline, tmp_path / "narrow.onnx", keep=["max_abs<=1e-9"])
    assert found is not None
    assert found.text == pipeline
    assert found.site is not None
    assert found.site.startswith("MatMul")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_text("no")
    with pytest.raises(BadInput):
        bisect(tmp_path / "in.onnx", "fold-constants", tmp_path / "found.onnx")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"there is no planish\.json"):
        bisect(empty, "fold-constants", tmp_path / "found.onnx")


@pytest.mark.slow
def test_an_output_goes_on_from_its_engine(tiny: Path, tmp_path: Path) -> None:
    """Held against the original, and, as `fast` was, against its own budget and not the noise of an exact one."""
    optimize(tiny, tmp_path / "out", preset="fast", keep=["cosine>=0.9"], clock=all_faster)
    assert bisect(tmp_path / "out", "eliminate-identities", tmp_path / "found.onnx") is None
    pipeline = "fold-constants,prune-ffn{keep=0.1 multiple=1}"
    found = bisect(tmp_path / "out", pipeline, tmp_path / "found.onnx", keep=["max_abs<=1e-9"])
    assert found is not None
    assert found.text == "prune-ffn{keep=0.1 multiple=1}"
    optimize(tiny, tmp_path / "other", targets=["openvino"], reference="none")
    with pytest.raises(BadInput, match=r"no engine of ONNX files.*give the \.onnx file"):
        bisect(tmp_path / "other", "fold-constants", tmp_path / "found.onnx")
