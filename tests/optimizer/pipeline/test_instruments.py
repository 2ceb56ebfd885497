"""Instruments: what they see, in which order, and that a failure can be reproduced by the command it prints."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer import Pass, PassResult, Pipeline
from planish.optimizer.errors import BadInput, CheckFailed, InternalError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.interfaces import registry
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.program import Axis, Signature, TensorSpec
from planish.optimizer.pipeline.instruments import (
    CompareEach,
    Instrument,
    MeasureCost,
    PrintIR,
    Reproducer,
    Step,
    VerifyEach,
)

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[N, 4] x) => (float[N, 4] r) { y = Identity (x)  z = Relu (y)  r = Add (z, z) }"""
X, R = (TensorSpec(name, ir.DataType.FLOAT, ("N", 4)) for name in ("x", "r"))
SIGNATURE = Signature((X,), (R,), {"N": Axis("N")})
CASE = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


@dataclass(frozen=True)
class Break(Pass):
    """Turn every Relu into another operator."""

    name: ClassVar[str] = "break"
    op_type: str = "Abs"
    honest: bool = True

    def call(self, model: ir.Model) -> PassResult:
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = self.op_type
        return PassResult(model, modified=self.honest)


def model() -> ir.Model:
    return ir.from_onnx_text(GRAPH)


def comparer(bound: str = "max_abs<=1e-6") -> CompareEach:
    return CompareEach(SIGNATURE, [CASE], lambda _: Budget.parse([bound]), registry.backend("onnxruntime").load)


def test_a_pass_that_moves_outputs_is_named_with_the_figure() -> None:
    with pytest.raises(
        CheckFailed, match=r"break moved the outputs: max_abs of r is 2, the budget asks max_abs<=1e-06"
    ):
        Pipeline((Break(),)).run(model(), [comparer()])


def test_a_graph_that_does_not_run_is_named_too() -> None:
    with pytest.raises(CheckFailed, match="break left a graph that does not run"):
        Pipeline((Break("NoSuchOperator"),)).run(model(), [comparer()])


def test_exact_passes_are_compared_and_the_difference_is_reported() -> None:
    outcome = Pipeline.parse("eliminate-identities").run(model(), [comparer()])
    (report,) = outcome.reports
    assert report.comparison is not None
    assert report.comparison.outputs["r"]["max_abs"] == 0


def test_broken_structure_is_shown_under_its_node() -> None:
    with pytest.raises(CheckFailed, match="break: ") as caught:
        Pipeline((Break("NoSuchOperator"),)).run(model(), [VerifyEach()])
    assert "NoSuchOperator" in (caught.value.picture or "")


def test_a_pass_that_lies_about_having_changed_nothing() -> None:
    with pytest.raises(CheckFailed, match="break said it changed nothing, but the graph is different"):
        Pipeline((Break(honest=False),)).run(model(), [VerifyEach()])


def test_timing_measures_every_pass() -> None:
    reports = Pipeline.parse("eliminate-identities,remove-unused-nodes").run(model(), [MeasureCost()]).reports
    assert all(report.measured["seconds"] > 0 for report in reports)
    assert all(report.measured["peak_memory_growth_bytes"] >= 0 for report in reports)


def test_instruments_nest_like_brackets() -> None:
    seen: list[str] = []

    class Watcher(Instrument):
        def __init__(self, name: str) -> None:
            self.name = name

        def before(self, step: Step) -> None:
            seen.append(f"{self.name} before")

        def after(self, step: Step) -> None:
            seen.append(f"{self.name} after")

    Pipeline.parse("eliminate-identities").run(model(), [Watcher("a"), Watcher("b")])
    assert seen == ["a before", "b before", "b after", "a after"]


@pytest.mark.parametrize(("when", "shown"), [("before", 2), ("after", 2), ("after-change", 1)])
def test_graphs_are_printed_when_asked(when: str, shown: int) -> None:
    file = StringIO()
    Pipeline.parse("fuse-gelu,eliminate-identities").run(model(), [PrintIR(when, file=file)])  # type: ignore[arg-type]
    assert file.getvalue().count(f"// {when.partition('-')[0]} ") == shown


def test_only_one_pass_is_printed_if_asked() -> None:
    file = StringIO()
    Pipeline.parse("fuse-gelu,eliminate-identities").run(model(), [PrintIR("after", "fuse-gelu", file)])
    assert file.getvalue().startswith("// after fuse-gelu\n")
    assert "eliminate-identities" not in file.getvalue()


def test_a_failure_leaves_the_graph_before_it_and_the_command(tmp_path: Path) -> None:
    reproducer = Reproducer(tmp_path, onnx_io.save, ["--no-check"])
    pipeline = Pipeline(
        (*Pipeline.parse("eliminate-identities").passes, Break("NoSuchOperator"), *Pipeline.parse("fuse-gelu").passes)
    )
    with pytest.raises(CheckFailed) as caught:
        pipeline.run(model(), [reproducer, VerifyEach()])
    (command,) = reproducer.commands
    assert str(caught.value).endswith(f"reproduce with: {command}")
    words = shlex.split(command)
    assert words[:2] == ["planish", "opt"]
    assert words[words.index("--pipeline") + 1] == "break{op_type=NoSuchOperator},fuse-gelu"
    kept = onnx_io.load(Path(words[2]))
    assert [node.op_type for node in kept.graph] == ["Relu", "Add"]
    assert sys.executable not in (tmp_path / "break" / "command.txt").read_text()


@pytest.mark.parametrize("kind", [BadInput, InternalError, CheckFailed])
def test_a_pass_is_not_blamed_for_the_original(kind: type[Exception], tmp_path: Path) -> None:
    """The budget of a pass waits for the original, which may turn out not to run."""

    def budget_of(_: Pass) -> Budget:
        raise kind("the original cannot be read")

    reproducer = Reproducer(tmp_path / "failed", onnx_io.save)
    comparer = CompareEach(SIGNATURE, [CASE], budget_of, registry.backend("onnxruntime").load)
    with pytest.raises(kind, match=r"^the original cannot be read$"):
        Pipeline.parse("eliminate-identities").run(model(), [reproducer, comparer])
    assert not (tmp_path / "failed").exists()
