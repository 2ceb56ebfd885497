"""Small ONNX files that ask for more memory or time than there is."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from planish.optimizer.compilation.references import file_reference
from planish.optimizer.fidelity.inputs import make_inputs, quick
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.original import limited_process
from tests.optimizer.cli.test_bad_input import refused
from tests.optimizer.lowering.small_graphs import HUGE, RESOURCES, info, model, node, saved, well


def doubled(operator: str, count: int) -> onnx.ModelProto:
    names = ["k", *(f"v{index}" for index in range(count))]
    kept = {"axis": 0} if operator == "Concat" else {}
    chain = [node(operator, f"{old} {old}", new, **kept) for old, new in itertools.pairwise(names)]
    return model(*chain, node("Expand", f"x {names[-1]}"), k=np.array([1]))


def loop(rounds: int) -> onnx.ModelProto:
    body = oh.make_graph(
        [node("Identity", "c", "d"), node("Add", "a a", "b")], "body",
        [info("i", kind=7), info("c", kind=9), info("a", 2, 4)], [info("d", kind=9), info("b", 2, 4)],
    )  # fmt: skip
    return model(node("Loop", "n go x", body=body), n=np.array(rounds), go=np.array(True))


GREEDY: dict[str, Callable[[], onnx.ModelProto]] = {
    "Range": lambda: model(node("Range", "a b c", "r"), node("Shape", "r", "y"), outputs=(info("y", 1, kind=7),), a=np.array(0), b=np.array(HUGE), c=np.array(1)),
    "ConstantOfShape": lambda: model(node("ConstantOfShape", "s", "r"), node("ReduceSum", "r", "y"), s=np.array([HUGE])),
    "Expand": lambda: model(node("Expand", "k s", "r"), node("ReduceSum", "r", "y"), k=np.ones(1, np.float32), s=np.array([HUGE])),
    "Tile": lambda: model(node("Tile", "k s", "r"), node("ReduceSum", "r", "y"), k=np.ones(1, np.float32), s=np.array([HUGE])),
    "an output of a gigabyte": lambda: model(node("ConstantOfShape", "s"), outputs=(info("y", 1 << 28),), s=np.array([1 << 28])),
    "an input": lambda: model(inputs=(info("x", 1 << 31),), outputs=(info("y", 1 << 31),)),
    "an input of two axes": lambda: model(inputs=(info("x", 1 << 20, 1 << 20),), outputs=(info("y", 1 << 20, 1 << 20),)),
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_small_files_do_not_take_the_machine(name: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    refused(RESOURCES, "", "opt", saved(tmp_path, GREEDY[name]()), "-o", tmp_path / "out.onnx", "--preset", "exact")
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["ConstantOfShape", "Expand", "Tile"])
def test_what_is_greedy_is_not_folded(name: str, tmp_path: Path) -> None:
    """Without a comparison nothing is computed at all."""
    path = saved(tmp_path, GREEDY[name]())
    well("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact", "--no-check")
    assert name in {made.op_type for made in onnx.load(tmp_path / "out.onnx").graph.node}


@pytest.mark.parametrize("operator", ["Concat", "Mul", "Add"])
def test_chains_that_double(operator: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    well("opt", saved(tmp_path, doubled(operator, 60)), "-o", tmp_path / "out.onnx", "--preset", "exact", "--no-check")
    assert time.perf_counter() - start < 10


@pytest.mark.slow
def test_a_loop_without_end_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "_BASE_SECONDS", 1.0)
    monkeypatch.setattr(limited_process, "_run_confined", no_process)
    path = saved(tmp_path, loop((1 << 63) - 1))
    refused(RESOURCES, "takes longer than 1 s", "opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_memory_of_the_process_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that only a run can tell: half a gigabyte where 64 MB are allowed."""
    grown = [
        node("NonZero", "x", "z"),
        node("Shape", "z", "s"),
        node("ReduceProd", "s", "p", keepdims=1),
        node("Mul", "p k", "m"),
    ]
    path = saved(
        tmp_path, model(*grown, node("ConstantOfShape", "m", "r"), node("ReduceSum", "r", "y"), k=np.array([1 << 23]))
    )
    monkeypatch.setattr(limited_process, "_BASE_BYTES", 64 << 20)
    refused(RESOURCES, "takes too much memory", "opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def test_a_loop_that_is_run_apart_computes_what_it_would_here(tmp_path: Path) -> None:
    path = saved(tmp_path, loop(3))
    lowered = lower(path)
    cases = quick(make_inputs(lowered.program.sole()[1]))
    assert not limited_process.size_at(lowered.program.sole()[0], cases[0]).small
    reference = file_reference(lowered)
    np.testing.assert_array_equal(reference.outputs[0]["y"], cases[0]["x"] * 8)
    well("opt", path, "-o", tmp_path / "out.onnx", "--preset", "exact")


def no_process(*_: object) -> limited_process.Run:
    """In the place of what starts a process."""
    raise AssertionError("a process was started")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has forks that are safe")
@pytest.mark.parametrize("made", [model(node("MatMul", "x w"), w=np.ones((4, 4), np.float32)), loop(3)])
def test_a_fork_runs_files_of_few_weights(
    made: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited_process, "_run_confined", no_process)
    well("opt", saved(tmp_path, made), "-o", tmp_path / "out.onnx", "--preset", "exact")
