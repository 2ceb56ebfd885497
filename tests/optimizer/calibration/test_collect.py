"""What passes see of activations: accumulators that do not grow, padding that does not count, data that do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.optimizer import Pipeline
from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.observers import BINS, ChannelObserver, GramObserver, HistogramObserver, statistic_of
from planish.optimizer.interfaces.pass_base import Pass, PassResult, StatisticRequest
from planish.optimizer.ir.program import Arrays, Role, Signature, TensorSpec

LOAD = registry.backend("onnxruntime").load
WIDTH = 6


def model() -> ir.Model:
    """r = (x · w) · v, with texts and tokens along the first axes."""
    rng = np.random.default_rng(0)
    tensors = [nh.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32), name) for name in "wv"]
    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["y"], name="one"),
        oh.make_node("MatMul", ["y", "v"], ["r"], name="two"),
    ]
    values = [oh.make_tensor_value_info(n, 1, ["batch", "sequence", WIDTH]) for n in "xyr"]
    mask = oh.make_tensor_value_info("mask", 7, ["batch", "sequence"])
    graph = oh.make_graph(nodes, "g", [values[0], mask], [values[2]], tensors, value_info=[values[1]])
    made: ir.Model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))
    return made


@dataclass(frozen=True)
class Look(Pass):
    """Requests every statistic of y and x."""

    name: ClassVar[str] = "look"

    def statistics(self, model: ir.Model) -> list[StatisticRequest]:
        node = next(iter(model.graph))
        values = [node.outputs[0], node.inputs[0]]
        return [
            StatisticRequest(v, kind)
            for v in values
            if v is not None
            for kind in (HistogramObserver, ChannelObserver, GramObserver)
        ]

    def consume(self, model: ir.Model) -> None:
        for wish in self.statistics(model):
            gram = statistic_of(wish.value, GramObserver)
            if gram is not None:
                wish.value.meta["digested"] = gram.mean

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, modified=False)


def batches(count: int, *, padded: bool = False) -> Iterator[Arrays]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        data = rng.standard_normal((2, 4, WIDTH)).astype(np.float32)
        mask = np.ones((2, 4), np.int64)
        if padded:
            mask[1, 2:] = 0
            data[1, 2:] = 1e4
        yield {"x": data, "mask": mask}


def signature() -> Signature:
    x = TensorSpec("x", ir.DataType.FLOAT, ("batch", "sequence", WIDTH), Role.VALUES)
    mask = TensorSpec("mask", ir.DataType.INT64, ("batch", "sequence"), Role.MASK)
    return Signature((x, mask), ())


def look(count: int, *, padded: bool = False, limit: int = 1 << 20) -> tuple[ir.Model, list[str]]:
    said: list[str] = []
    graph = model()
    Calibrate(signature(), lambda: batches(count, padded=padded), LOAD, said.append, limit).gather(Look(), graph)
    return graph, said


def test_what_was_seen_is_forgotten_once_the_pass_has_run() -> None:
    graph = model()
    Pipeline((Look(),)).run(graph, [Calibrate(signature(), lambda: batches(1), LOAD)])
    assert statistic_of(next(iter(graph.graph)).outputs[0], HistogramObserver) is None


def test_what_is_seen_is_what_was_there() -> None:
    graph, said = look(5)
    node = next(iter(graph.graph))
    rows = np.concatenate([case["x"].reshape(-1, WIDTH) for case in batches(5)])
    assert node.inputs[1] is not None
    assert node.inputs[1].const_value is not None
    for value, wanted in ((node.inputs[0], rows), (node.outputs[0], rows @ node.inputs[1].const_value.numpy())):
        assert value is not None
        spread, channels, gram = (
            statistic_of(value, HistogramObserver),
            statistic_of(value, ChannelObserver),
            statistic_of(value, GramObserver),
        )
        assert spread is not None
        assert channels is not None
        assert gram is None  # it is bulky: only what the pass made of it stays
        assert (spread.rows, spread.batches, spread.counts.sum()) == (40, 5, 40 * WIDTH)
        assert math.isclose(spread.low, wanted.min(), rel_tol=1e-5)
        np.testing.assert_allclose(channels.largest, np.abs(wanted).max(axis=0), rtol=1e-5)
        np.testing.assert_allclose(channels.mean, wanted.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(value.meta["digested"], wanted.T @ wanted / 40, rtol=1e-3, atol=1e-3)
    assert said == ["look: 6 observations, 0.1 MB, data read once"]


def test_a_limit_of_memory_means_more_runs_and_the_same_result() -> None:
    (once, _), (often, said) = look(3), look(3, limit=BINS * 8)
    assert said[0].endswith("data read 4 times")
    for graph in (once, often):
        found = statistic_of(next(iter(graph.graph)).outputs[0], HistogramObserver)
        assert found is not None
        assert found.batches == 3


def test_padding_is_not_seen() -> None:
    graph, _ = look(2, padded=True)
    for value in (next(iter(graph.graph)).outputs[0], next(iter(graph.graph)).inputs[0]):
        assert value is not None
        found = statistic_of(value, ChannelObserver)
        assert found is not None
        assert found.rows == 12
        assert found.largest.max() < 1e3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_histogram_forgets_nothing_as_its_range_grows(parts: list[list[float]]) -> None:
    grown, whole = HistogramObserver(), HistogramObserver()
    for part in parts:
        grown.add(np.array([part], np.float32))
    joined = np.array([[entry for part in parts for entry in part]], np.float32)
    whole.add(joined)
    assert (grown.low, grown.high, grown.bound) == (whole.low, whole.high, whole.bound)
    assert grown.counts.sum() == whole.counts.sum() == joined.size
    step = 2 * grown.bound / BINS
    places = np.cumsum(grown.counts) - np.cumsum(whole.counts)
    assert np.abs(places).sum() * step <= joined.size * step  # an entry on a border may fall on either side


def test_nan_is_remembered() -> None:
    found = HistogramObserver()
    found.add(np.array([[1, 2]], np.float32))
    found.add(np.array([[math.nan, 2]], np.float32))
    found.add(np.array([[1, 2]], np.float32))
    assert not found.finite


@pytest.mark.parametrize("kind", [HistogramObserver, ChannelObserver, GramObserver])
def test_accumulators_have_the_size_that_they_say(
    kind: type[HistogramObserver | ChannelObserver | GramObserver],
) -> None:
    found = kind()
    for _ in range(3):
        found.add(np.ones((10, 64), np.float32))
    held = sum(part.nbytes for part in vars(found).values() if isinstance(part, np.ndarray))
    assert held <= kind.size(64) <= 3 * held
