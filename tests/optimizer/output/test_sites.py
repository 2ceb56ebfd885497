"""Every site keeps its record: what fired, what was refused and why; and a build fails when a fusion stops firing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest

from planish.optimizer import optimize
from planish.optimizer.driver.explain import explain
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.output.sites import SITES, Expectation, of_pass, read_sites
from tests.clocks import all_equal, all_faster
from tests.conftest import Planish

SCOPES = "pkg.torch.onnx.name_scopes"
ATTENTION = """<ir_version: 10, opset_import: ["" : 23]>
g (float[N,3,M,8] q, float[N,3,M,8] k, float[N,3,M,8] v, float[N,3,8,M] turned) => (float[N,3,M,8] r, float[N,3,M,8] s) {
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  a = MatMul (q, t)
  p = Softmax (a)
  r = MatMul (p, v)
  b = MatMul (q, turned)
  o = Softmax (b)
  s = MatMul (o, v)
}"""


FUSED = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,2,rows,8] q, float[batch,2,rows,8] k, float[batch,2,rows,8] v) => (float[batch,2,rows,8] y) {
  y = Attention (q, k, v)
}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two attentions, the keys of the second already transposed; it comes from a known module."""
    proto = onnx.parser.parse_model(ATTENTION)
    for node in proto.graph.node[4:]:
        node.name = f"node_{node.output[0]}"
        node.metadata_props.add(key=SCOPES, value="['', 'layers.7.attention', 'softmax']")
    path = tmp_path / "in.onnx"
    onnx.save(proto, path)
    return path


def test_explain_says_in_three_lines_why_an_attention_does_not_match(model: Path, command: Planish) -> None:
    done = command("explain", model, "--pass", "fuse-attention")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.rstrip().splitlines()[-3:]
    assert first == "fuse-attention refused at Softmax 'node_o'"
    assert second.split() == ["in", "module", "layers.7.attention"]
    assert third.split(maxsplit=1) == ["because", "its keys are not seen to be transposed: turned"]
    assert "fuse-attention fired at Softmax" in done.stdout


def test_explain_counts_what_fired_what_was_refused_and_what_was_near(model: Path) -> None:
    (rewritten,) = explain(model).values()
    (sites,) = of_pass(rewritten.sites, "fuse-attention")
    assert (len(sites.fired), len(sites.refused), len(sites.near_misses)) == (1, 1, 0)


def test_explain_counts_the_operators_that_are_left(tmp_path: Path, command: Planish) -> None:
    """An exporter that fused attention itself leaves nothing to fire at, and the answer is yes all the same."""
    path = tmp_path / "fused.onnx"
    onnx.save(onnx.parser.parse_model(FUSED), path)
    (rewritten,) = explain(path, preset="exact", target="openvino").values()
    assert [len(sites.fired) for sites in rewritten.sites if sites.name == "fuse-attention"] == [0]
    assert rewritten.operators["Attention"] == 1
    assert "Attention" not in rewritten.shipped  # OpenVINO gets its parts
    assert rewritten.shipped["Softmax"] == 1
    table = command("explain", path, "--target", "openvino").stdout
    assert re.search(r"^ *Attention +1 +0 *$", table, re.MULTILINE)
    assert command("explain", path, "--expect", "Attention=1").returncode == 0
    assert command("explain", path, "--expect", "Attention=0").returncode == 1


def test_a_pattern_found_in_part_is_a_near_miss(tmp_path: Path, command: Planish) -> None:
    path = tmp_path / "near.onnx"
    onnx.save(onnx.parser.parse_model(ATTENTION.replace("r = MatMul (p, v)", "r = MatMul (v, p)")), path)
    found = json.loads(command("explain", path, "--pass", "fuse-attention", "--json").stdout)["passes"]
    assert [refusal["near"] for refusal in found[0]["refusals"]] == [True, False]
    assert "nearly fired at Softmax" in command("explain", path).stdout


@pytest.mark.slow
def test_an_output_keeps_its_sites(model: Path, tmp_path: Path, command: Planish) -> None:
    out = tmp_path / "out"
    result = optimize(model, out, targets=["onnxruntime", "openvino"], expect=["fuse-attention=1"], clock=all_faster)
    found = read_sites(out)
    assert {sites.target for sites in found} == {"onnxruntime", "openvino"}
    assert SITES in result.manifest.files
    explained = [sites for rewritten in explain(out).values() for sites in rewritten.sites]
    assert of_pass(found, "fuse-attention") == of_pass(explained, "fuse-attention")
    assert list(explain(out, target="openvino")) == ["openvino"]
    with pytest.raises(UsageError, match="has no engine 'tensorrt'"):
        explain(out, target="tensorrt")
    done = command("explain", out)
    assert "openvino" in done.stdout
    assert done.stdout.count("because    its keys are not seen to be transposed: turned") == 2
    assert command("explain", out, "--expect", "fuse-attention=2").returncode == 1
    assert command("explain", out, "--pipeline", "fuse-gelu").returncode == 2


@pytest.mark.slow
def test_a_fusion_that_stops_firing_fails_the_build(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"fired at 1 sites, 2 were expected.*its keys are not seen to be transposed"):
        optimize(model, tmp_path / "out", expect=["fuse-attention=2"], clock=all_equal)
    assert not (tmp_path / "out").exists()


def test_a_build_without_passes_misses_what_is_expected(tiny: Path, tmp_path: Path) -> None:
    """A preset that nothing can be held against runs no pass: that is not silence."""
    with pytest.raises(UsageError, match="no pipeline of onnxruntime has that pass"):
        optimize(tiny, tmp_path / "out", reference="none", expect=["fuse-gelu=1"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_opt_holds_expectations_before_it_writes(model: Path, tmp_path: Path, command: Planish) -> None:
    arguments = ("opt", model, "-o", tmp_path / "out.onnx", "--pipeline", "fuse-attention")
    assert command(*arguments, "--expect", "fuse-attention=3").returncode == 1
    assert not (tmp_path / "out.onnx").exists()
    assert command(*arguments, "--expect", "fuse-attention=1").returncode == 0
    absent = command(*arguments, "--expect", "fuse-gelu=1")
    assert absent.returncode == 2
    assert "no pipeline of onnxruntime has that pass (there are: fuse-attention)" in absent.stderr
    assert command(*arguments, "--expect", "Attention=2").returncode == 1
    assert command(*arguments, "--expect", "Attention=1").returncode == 0


@pytest.mark.parametrize("text", ["fuse-attention", "fuse-attention=many", "=3", "fuse-atention=3"])
def test_expectations_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        Expectation.parse(text)


def test_explain_of_a_pass_that_is_not_there(model: Path, command: Planish) -> None:
    done = command("explain", model, "--pass", "fuse-atention")
    assert done.returncode == 2
    assert "did you mean 'fuse-attention'" in done.stderr
