"""A request is held against what was lowered: what cannot be measured, timed or used is refused, never taken for kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from planish.optimizer import bench, optimize
from planish.optimizer.cli.options import parse_shapes
from planish.optimizer.compilation.options import BuildOptions
from planish.optimizer.compilation.request import request_of
from planish.optimizer.driver.bisect import bisect
from planish.optimizer.driver.opt import OptOptions, optimize_file
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.fidelity.budget import Budget, measured_metrics, metrics_of
from planish.optimizer.fidelity.inputs import refuse_other_sizes
from planish.optimizer.fidelity.metrics import METRICS
from planish.optimizer.ir.program import Axis, Program, Provenance, Role, Signature, TensorSpec
from planish.optimizer.lowering import lower
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.timing.interleaved import Timing
from tests.clocks import all_equal
from tests.optimizer.cli.test_bad_input import USAGE, refused
from tests.zoo import Species, build

ENCODER = "max_abs, max_rel, cosine, cosine_min"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose output is hidden states."""
    return build(Species("bert", "feature-extraction"), tmp_path_factory.mktemp("encoder"))


def component(outputs: tuple[TensorSpec, ...], *, cached: bool = False) -> Signature:
    """What a component of a decoder or an encoder-decoder takes and gives, as checkpoints are lowered."""
    ids = TensorSpec("input_ids", ir.DataType.INT64, ("batch", "sequence"), Role.TOKENS, 99)
    past = TensorSpec("past_key_values.0.key", ir.DataType.FLOAT, ("batch", 3, "past", 8), Role.CACHE)
    axes = {"batch": Axis("batch"), "sequence": Axis("sequence", 1, 48)} | (
        {"past": Axis("past", 0, 47)} if cached else {}
    )
    return Signature((ids, *([past] if cached else [])), outputs, axes)


LOGITS = TensorSpec("logits", ir.DataType.FLOAT, ("batch", "sequence", 99), Role.LOGITS)
HIDDEN = TensorSpec("last_hidden_state", ir.DataType.FLOAT, ("batch", "sequence", 24), Role.HIDDEN)


@pytest.fixture
def writer() -> Program:
    return Program({}, {"model": component((LOGITS,), cached=True)}, "text-generation", Provenance("checkpoint", "W"))


@pytest.fixture
def translator() -> Program:
    signatures = {
        "encoder_model": component((HIDDEN,)),
        "decoder_model": component((LOGITS,)),
        "decoder_with_past_model": component((LOGITS,), cached=True),
    }
    return Program({}, signatures, "text2text-generation", Provenance("checkpoint", "T"))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One product behind an Identity, and nothing to fuse."""
    weights = nh.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    borders = [oh.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", size]) for n, size in (("x", 4), ("y", 3))]
    nodes = [oh.make_node("Identity", ["x"], ["same"]), oh.make_node("MatMul", ["same", "w"], ["y"], name="product")]
    made = oh.make_model(
        oh.make_graph(nodes, "g", borders[:1], borders[1:], [weights]),
        opset_imports=[oh.make_opsetid("", 23)],
        ir_version=10,
    )
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(made, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("top1>=0.9", "no output is a vector of scores"),
        ("perplexity<=1.1x", "no output scores the next token"),
        ("kl<=0.1", "no tokens are written"),
        ("greedy>=0.9", "no tokens are written"),
    ],
)
def test_a_budget_that_an_encoder_has_no_metric_for(
    budget: str, reason: str, encoder: Path, graph: Path, tmp_path: Path
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: optimize(encoder, tmp_path / "out", preset="fast", keep=[budget]),
        lambda: optimize_file(
            graph, tmp_path / "out.onnx", OptOptions(pipeline="quantize-int8{minimum=1}", keep=[budget])
        ),
        lambda: bisect(graph, "quantize-int8{minimum=1}", tmp_path / "found.onnx", keep=[budget]),
    ]
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert reason in str(caught.value)
        assert str(caught.value).endswith(f"there are: {ENCODER}")
        assert budget in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_the_same(encoder: Path, graph: Path, tmp_path: Path) -> None:
    out, keep = ["-o", tmp_path / "out.onnx"], ["--keep", "top1>=0.9"]
    said = f"--keep top1>=0.9: this cannot be measured here: no output is a vector of scores; there are: {ENCODER}"
    refused(USAGE, said, "optimize", encoder, "-o", tmp_path / "out", *keep)
    refused(USAGE, said, "opt", graph, "--pipeline", "quantize-int8", *out, *keep)
    refused(USAGE, said, "bisect", graph, "--pipeline", "quantize-int8", *out, *keep)
    refused(USAGE, "score", "opt", graph, "--pipeline", "quantize-int8", *out, "--keep", "score>=0.9")
    refused(USAGE, "give --evaluate", "optimize", encoder, "-o", tmp_path / "out", "--keep", "score>=0.9")
    assert list(tmp_path.iterdir()) == []


def test_which_program_has_which_metrics(writer: Program, translator: Program) -> None:
    everything = {"max_abs", "max_rel", "cosine", "cosine_min", "top1", "perplexity", "kl", "greedy"}
    assert measured_metrics(writer) == measured_metrics(translator) == everything
    assert measured_metrics(writer, evaluated=True) == everything | {"score", "score_ratio"}
    first = next(iter(translator.signatures.values()))
    assert metrics_of(first) == {"max_abs", "max_rel", "cosine", "cosine_min"}
    (signature,) = writer.signatures.values()
    outputs = [replace(t, shape=(t.shape[0], 1, *t.shape[2:])) for t in signature.outputs if t.name == "logits"]
    assert metrics_of(replace(signature, outputs=tuple(outputs))) == metrics_of(signature) - {"perplexity"}


def requested(*keep: str, preset: str | None = "small") -> Any:
    pipeline = None if preset else "quantize-int8"
    return request_of(BuildOptions(preset=preset, pipeline=pipeline, keep=keep), calibrated=False)


def test_passes_on_a_component_without_the_metric_keep_the_default_of_the_preset(translator: Program) -> None:
    """A budget on perplexity says nothing of an encoder: its products were all rounded, whatever that cost."""
    encoder, first, decoder = translator.signatures.values()
    request = requested("perplexity<=1.02x")
    assert str(request.steering(encoder)) == str(request.steering(first)) == "cosine>=0.99"
    assert str(request.steering(decoder)) == "perplexity<=1.02x"
    note, _ = request.replaced(translator)
    assert "the encoder_model alone" in note
    assert note.endswith("are held against cosine>=0.99 there")
    assert requested("cosine>=0.9").replaced(translator) == []
    assert len(requested("kl<=0.1").replaced(translator)) == len(translator.signatures)
    assert requested("kl<=0.1", preset=None).replaced(translator) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"length": 4}, "no input has an axis 'length'"),
        ({"sequence": 49}, "the model takes 1 to 48 along 'sequence'"),
        ({"batch": 2, "sequence": 8, "choices": 2}, "no input has an axis 'choices'"),
    ],
)
def test_sizes_that_no_engine_has(shape: dict[str, int], message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        optimize(tiny, tmp_path / "out", shapes=[shape])
    text = ",".join(f"{name}={size}" for name, size in shape.items())
    refused(USAGE, f"--shape {text}: {message}", "optimize", tiny, "-o", tmp_path / "out", "--shape", text)
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_a_cache_and_of_fixed_axes(writer: Program) -> None:
    (signature,) = writer.signatures.values()
    longest = signature.axes["sequence"].maximum
    assert longest is not None
    refuse_other_sizes([signature], [{"batch": 3, "sequence": 1, "past": longest - 1}])
    with pytest.raises(UsageError, match="behind so many tokens the model takes a past of"):
        refuse_other_sizes([signature], [{"sequence": longest, "past": 5}])
    with pytest.raises(UsageError, match="the model takes only 2 along 'batch'"):
        refuse_other_sizes([signature.with_fixed({"batch": 2})], [{"batch": 1}])


def test_the_usual_names_stand_for_axes_of_other_names(graph: Path) -> None:
    signature = lower(graph).program.sole()[1]
    assert list(signature.axes) == ["rows"]
    refuse_other_sizes([signature], [{"batch": 7}, {"rows": 7}])
    with pytest.raises(UsageError, match="there are: rows"):
        refuse_other_sizes([signature], [{"sequence": 7}])


def test_bench_refuses_what_it_cannot_time(graph: Path) -> None:
    refused(USAGE, "no input has an axis 'sequence'", "bench", graph, "--shape", "sequence=8")
    refused(USAGE, "--target openvino: nothing here is opened with it", "bench", graph, "--target", "openvino")
    with pytest.raises(UsageError, match="there are engines of onnxruntime"):
        bench([graph], targets=["onnxruntime", "openvino"])


@pytest.mark.parametrize("text", ["batch=1,batch=2", "batch=0", "", "batch=²"])
def test_sizes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the sizes"):
        parse_shapes([text])
    assert parse_shapes(["batch=1,past=0"]) == [{"batch": 1, "past": 0}]


IDLE: dict[str, tuple[list[str], str]] = {
    "a budget, and nothing is compared": (["--reference", "none", "--keep", "cosine>=0.9"], "no budget can be kept"),
    "a judge, and nothing is compared": (["--reference", "none", "--evaluate", "true"], "are not judged"),
    "a size, and nothing is timed": (["--reference", "none", "--shape", "batch=1"], "nothing is timed"),
    "a size for offloaded weights": (["--reference", "offload", "--shape", "batch=1"], "nothing is timed"),
    "a pass that is expected and not run": (["--expect", "prune-ffn=2"], "no pipeline of onnxruntime has that pass"),
    "an expectation, and no pass runs": (["--reference", "none", "--expect", "fuse-gelu=1"], "no pipeline of"),
    "an unknown operator": (["--expect", "Atention=1"], "unknown operator 'Atention' (did you mean 'Attention'?)"),
}


@pytest.mark.parametrize("name", IDLE)
def test_options_that_would_do_nothing(name: str, tiny: Path, tmp_path: Path) -> None:
    arguments, message = IDLE[name]
    refused(USAGE, message, "optimize", tiny, "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_calibration_that_nothing_sees(tiny: Path, graph: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("w1 w2\n")
    np.savez(tmp_path / "arrays.npz", x=np.ones((2, 4), np.float32))
    build_it = ["optimize", tiny, "-o", tmp_path / "out"]
    texts = ["--calibration", tmp_path / "texts.txt"]
    refused(USAGE, "sees activations", *build_it, *texts, "--samples", "3")
    refused(USAGE, "a preset runs no pass then", *build_it, *texts, "--reference", "none")
    arrays = ["--calibration", tmp_path / "arrays.npz"]
    refused(USAGE, "all rows of an .npz file are taken", *build_it, *arrays, "--preset", "fast", "--samples", "3")
    opt = ["opt", graph, "-o", tmp_path / "out.onnx"]
    refused(USAGE, "sees activations", *opt, "--pipeline", "fuse-gelu", *arrays)
    refused(USAGE, "no budget can be kept", *opt, "--pipeline", "quantize-int8", "--no-check", "--keep", "cosine>=0.9")
    refused(USAGE, "a target chooses among presets", *opt, "--pipeline", "fuse-gelu", "--target", "openvino")
    refused(
        USAGE, "a target chooses among presets", "explain", graph, "--pipeline", "fuse-gelu", "--target", "openvino"
    )


def test_bisect_needs_a_budget_for_passes_that_are_not_exact(graph: Path, tmp_path: Path) -> None:
    found = ["-o", tmp_path / "found.onnx"]
    refused(USAGE, "give --keep METRIC>=X", "bisect", graph, "--pipeline", "quantize-int8{minimum=1}", *found)
    refused(USAGE, "all passes are exact", "bisect", graph, "--pipeline", "fuse-gelu", "--keep", "cosine>=0.9", *found)


def test_exact_passes_of_opt_keep_what_was_asked_for(graph: Path, tmp_path: Path) -> None:
    """`--keep` was not looked at where all passes are exact."""
    optimize_file(graph, tmp_path / "out.onnx", OptOptions(pipeline="eliminate-identities", keep=["max_abs<=0"]))
    with pytest.raises(CheckFailed, match="eliminate-identities moved the outputs: max_abs of y is 0"):
        optimize_file(graph, tmp_path / "no.onnx", OptOptions(pipeline="eliminate-identities", keep=["max_abs<=-1"]))


@pytest.mark.slow
def test_a_pipeline_that_fires_nowhere_says_so(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planish.optimizer.cli import main

    result = optimize(graph, tmp_path / "out", pipeline="fuse-attention,fuse-gelu", clock=all_equal)
    record = result.manifest.targets["onnxruntime"]
    assert (record.shipped, record.why) == ("plain", "the same files as the plain lowering; no pass changed anything")
    assert Lock.read(tmp_path / "out" / LOCK).targets["onnxruntime"].shipped == "plain"
    assert any(note.startswith("no pass changed anything for onnxruntime") for note in result.notes)
    unchecked = optimize(graph, tmp_path / "unchecked", pipeline="fuse-gelu", reference="none")
    assert unchecked.manifest.targets["onnxruntime"].why.endswith(
        "NOT CHECKED, and not measured; no pass changed anything"
    )
    with pytest.raises(SystemExit):
        main(["opt", str(graph), "-o", str(tmp_path / "out.onnx"), "--pipeline", "fuse-gelu"])
    assert "planish: note: no pass changed anything" in capsys.readouterr().err


@pytest.mark.slow
def test_expectations_fail_before_anything_is_timed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(*_: object) -> list[Timing]:
        raise AssertionError("nothing shall be timed")

    def check(*_: object, **__: object) -> None:
        raise AssertionError("nothing shall be emitted and checked")

    with pytest.raises(CheckFailed, match="passes left 2 nodes Attention, 3 were expected"):
        optimize(tiny, tmp_path / "out", expect=["Attention=3"], clock=clock)
    monkeypatch.setattr("planish.optimizer.compilation.verdicts.check_engines", check)
    with pytest.raises(CheckFailed, match="fuse-attention fired at 0 sites, 5 were expected"):
        optimize(tiny, tmp_path / "out", expect=["fuse-attention=5"], clock=clock)
    assert list(tmp_path.iterdir()) == []


def test_every_metric_is_measured_or_refused() -> None:
    """A clause never holds for want of a value."""
    nothing = Program(
        {}, {"model": Signature((), (), {"batch": Axis("batch")})}, "inference", Provenance("onnx", "none")
    )
    for metric in METRICS:
        relation = "<=" if metric in ("max_abs", "max_rel", "perplexity", "kl") else ">="
        times = "x" if metric == "perplexity" else ""
        with pytest.raises(UsageError, match="cannot be measured here"):
            Budget.parse([f"{metric}{relation}0.5{times}"]).refuse_unmeasured(measured_metrics(nothing))


RUN: dict[str, tuple[str | None, list[str], str | None]] = {
    "tokens of an encoder": ("text-classification", ["--max-new-tokens", "3"], "does not go on with a text"),
    "drawing of an encoder": ("fill-mask", ["--temperature", "0.5"], "does not go on with a text"),
    "choices of a classifier": ("text-classification", ["--choice", "a"], "does not choose among answers"),
    "a pair of choices": ("multiple-choice", ["--pair", "a"], "give --choice"),
    "a pair to go on with": (None, ["--pair", "a"], "takes no second text"),
    "a draw without temperature": (None, ["--seed", "7"], "nothing is drawn without --temperature"),
    "a batch of one": ("fill-mask", ["--batch", "3"], "a single text is asked for"),
    "a pair of sentences": ("text-classification", ["--pair", "a"], None),
    "choices": ("multiple-choice", ["--choice", "a", "--choice", "b"], None),
    "a draw": (None, ["--temperature", "1", "--seed", "7", "--max-new-tokens", "3"], None),
}


@pytest.mark.parametrize("name", RUN)
def test_options_of_run_that_do_not_apply(name: str) -> None:
    from planish.optimizer.cli.run_command import command
    from planish.optimizer.cli.run_options import refuse_idle
    from planish.optimizer.inference.text_generation import TextGenerator
    from planish.optimizer.inference.text_tasks import TextTasks

    task, arguments, message = RUN[name]
    answerer = object.__new__(TextGenerator if task is None else TextTasks)
    if task is not None:
        answerer.name = task
    context = command.make_context("run", ["engine", "--text", "x", *arguments])
    if message is None:
        refuse_idle(context, answerer)
        return
    with pytest.raises(UsageError, match=message):
        refuse_idle(context, answerer)
    lines = command.make_context("run", ["engine", "--input", "a.txt", "--output", "b", "--pair", "a"])
    with pytest.raises(UsageError, match="every line of --input has its own"):
        refuse_idle(lines, answerer)


def test_what_is_said_of_a_source_that_it_cannot_mean(graph: Path) -> None:
    import torch

    refused(USAGE, "this file has no output 'logits'; it has: y", "optimize", graph, "-o", "x", "--task", "fill-mask")
    with pytest.raises(UsageError, match="are for a module"):
        lower(graph, sample_inputs={"x": torch.ones(1, 4)})
    with pytest.raises(UsageError, match="a module serves no named task"):
        lower(torch.nn.ReLU(), "fill-mask", sample_inputs={"input": torch.ones(1, 4)})


def test_a_single_text_is_one_target_and_one_budget() -> None:
    request = request_of(BuildOptions(targets="openvino", preset="fast", keep="cosine>=0.5"), calibrated=False)
    assert [target.name for target in request.targets] == ["openvino"]
    assert str(request.asked) == "cosine>=0.5"


@pytest.mark.parametrize(
    ("option", "value", "takes"),
    [
        ("logits", "first", "'all' or 'last'"),
        ("logits", None, "'all' or 'last'"),
        ("reference", "offloaded", "'full', 'offload' or 'none'"),
        ("shapes", {"N": 2}, "a list of sizes by axis"),
        ("shapes", [{"N": 2.5}], "a list of sizes by axis"),
        ("shapes", [{"N": -1}], "a list of sizes by axis"),
        ("fix", {"N": True}, "sizes by axis"),
        ("targets", [3], "a text or a list of texts"),
        ("keep", [1], "a text or a list of texts"),
        ("expect", None, "a text or a list of texts"),
        ("clock", None, "a function"),
        ("progress", 3, "a function"),
        ("samples", "5", "an integer of at least 1"),
        ("samples", 0, "an integer of at least 1"),
        ("calibration", 5, "a path, or texts or arrays by input name"),
        ("calibration", {"x": "text"}, "a path, or texts or arrays by input name"),
        ("lock", 3, "a path"),
        ("lock", "a\0b", "a path"),
        ("sample_inputs", [1], "tensors by keyword"),
        ("dynamic_axes", {"x": ["batch"]}, "names of axes by input and position"),
    ],
)
def test_options_of_another_type(option: str, value: object, takes: str, graph: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(UsageError) as caught:
        optimize(graph, tmp_path / "out", **options)
    assert str(caught.value).startswith(f"option {option}: this takes {takes}")
    assert list(tmp_path.iterdir()) == []


def test_options_are_kept_as_their_annotations_say() -> None:
    options = BuildOptions(expect="fuse-gelu=1", keep=["cosine>=0.9"], shapes=[{"batch": np.int64(2)}], lock=Path("x"))  # type: ignore[dict-item]
    assert (options.expect, options.keep, options.shapes) == (("fuse-gelu=1",), ("cosine>=0.9",), ({"batch": 2},))
    texts = iter(["a", "b"])
    assert replace(options, calibration=texts).calibration is texts
