"""Pipelines: text, options, the loop, rollback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.optimizer.ir.graph import scalar_of
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import Instrument, Step, VerifyEach, fingerprint

GRAPH = '<ir_version: 10, opset_import: ["" : 23]> g (float[2] x) => (float[2] r) { y = Relu (x)  r = Neg (y) }'


def model() -> ir.Model:
    return ir.from_onnx_text(GRAPH)


@dataclass(frozen=True)
class Double(Pass):
    """Rename every Relu to the operator that is given; a wrong pass where that does not exist."""

    name: ClassVar[str] = "double"
    op_type: str = "Abs"

    def call(self, model: ir.Model) -> PassResult:
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = self.op_type
        return PassResult(model, modified=True, sites=["Relu"])


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "somebody-elses"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_presets_are_text_that_round_trips(preset: str, target: str, *, calibrated: bool) -> None:
    text = presets.pipeline_text(preset, target, calibrated=calibrated)
    assert str(Pipeline.parse(text)) == str(Pipeline.parse(str(Pipeline.parse(text))))


def test_options_that_have_their_default_are_left_out() -> None:
    text = "prune-ffn{keep=0.75 multiple=8},order-for-memory{shape=[batch:1,sequence:128]},fold-constants"
    assert str(Pipeline.parse(text)) == "prune-ffn{multiple=8},order-for-memory,fold-constants"
    assert str(Pipeline.parse("")) == ""


def test_unknown_names_are_listed_at_once_with_the_nearest() -> None:
    text = "fold-constant,remove-unused-nodes,fuse-atention,zzz"
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    for part in (
        "'fold-constant' (did you mean 'fold-constants'?)",
        "(did you mean 'fuse-attention'?)",
        "'zzz' (there are:",
    ):
        assert part in caught.value.what
    assert caught.value.picture == f"{text}\n^"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune-ffn{keep=2}", "option keep='2': input should be less than or equal to 1"),
        ("prune-ffn{keep=half}", "option keep='half': input should be a valid number"),
        ("prune-ffn{kep=0.5}", "unknown option 'kep' (did you mean 'keep'?)"),
        ("quantize-int8{activations=row}", "input should be 'token', 'tensor', 'runtime' or 'static'"),
        ("fold-constants{limit=-1}", "greater than or equal to 0"),
    ],
)
def test_options_are_checked_against_their_types(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="pass ") as caught:
        Pipeline.parse(text)
    assert message in str(caught.value)


def test_reports_say_what_each_pass_did() -> None:
    outcome = Pipeline((Double(),)).run(model(), [VerifyEach()])
    (report,) = outcome.reports
    assert (report.text, report.modified, list(report.sites), report.nodes) == ("double", True, ["Relu"], (2, 2))


def test_a_failed_check_ends_the_run() -> None:
    with pytest.raises(CheckFailed, match="ONNX has no operator Absolutely"):
        Pipeline((Double("Absolutely"),)).run(model(), [VerifyEach()])


def test_a_failed_check_rolls_back_and_the_others_go_on() -> None:
    outcome = Pipeline((Double("Absolutely"), Double("Abs"))).run(model(), [VerifyEach()], on_failure="rollback")
    assert [report.rolled_back is None for report in outcome.reports] == [False, True]
    assert [node.op_type for node in outcome.model.graph] == ["Abs", "Neg"]
    assert not outcome.reports[0].modified


def test_the_applied_pipeline_leaves_out_what_was_rolled_back() -> None:
    text = "remove-unused-nodes,fold-constants"
    outcome = Pipeline.parse(text).run(model(), [FailFor("fold-constants")], on_failure="rollback")
    assert str(outcome.applied) == "remove-unused-nodes"


def test_instruments_nest() -> None:
    seen: list[str] = []
    Pipeline((Double(),)).run(model(), [Recorder("a", seen), Recorder("b", seen)])
    assert seen == ["a before", "b before", "b after", "a after"]


def test_a_pass_that_breaks_is_shown_to_the_instruments_and_raised() -> None:
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError):
        Pipeline((Broken(),)).run(model(), [Recorder("a", seen)], on_failure="rollback")
    assert seen == ["a before", "a failed ZeroDivisionError"]


@dataclass(frozen=True)
class Broken(Pass):
    """Raises."""

    name: ClassVar[str] = "broken"

    def call(self, model: ir.Model) -> PassResult:
        raise ZeroDivisionError


class FailFor(Instrument):
    def __init__(self, name: str) -> None:
        self.name = name

    def after(self, step: Step) -> None:
        if step.pass_.name == self.name:
            raise CheckFailed("not this one")


class Recorder(Instrument):
    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen

    def before(self, step: Step) -> None:
        self.seen.append(f"{self.name} before")

    def after(self, step: Step) -> None:
        self.seen.append(f"{self.name} after")

    def failed(self, step: Step, error: Exception) -> None:
        self.seen.append(f"{self.name} failed {type(error).__name__}")


def test_looking_at_a_constant_does_not_change_the_graph() -> None:
    """Or a pass that only looked would be said to have changed what it left alone."""
    body = "{ c = Constant <value: tensor = float {2}> ()  r = Mul (x, c) }"
    looked_at = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] r) {body}')
    before = fingerprint(looked_at)
    assert scalar_of(looked_at.graph[1].inputs[1]) == 2.0
    assert fingerprint(looked_at) == before
