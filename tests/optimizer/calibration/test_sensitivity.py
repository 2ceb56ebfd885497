"""Which products are rounded: the order of losses, the fewest that are skipped, and what the lock keeps of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer import Pipeline, optimize
from planish.optimizer.calibration.sensitivity import SelectMatMuls, decisions, losses, tightened
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.reference import Reference
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.quantization_pass import QuantizationPass
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.ir.program import Role, Signature, TensorSpec
from planish.optimizer.output.lock import Lock
from planish.optimizer.runtime.cases import thin
from tests.clocks import all_faster
from tests.conftest import Planish

WIDTH = 32
LOAD = registry.backend("onnxruntime").load


def model(spikes: float) -> ir.Model:
    """r = (x · a) · b + (x · c) · d; the columns of c hold an outlier, which leaves few steps for the rest."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 6 for name in "abcd"}
    weights["c"][0] = spikes
    pairs = [("x", "a", "p"), ("p", "b", "q"), ("x", "c", "s"), ("s", "d", "t")]
    nodes = [oh.make_node("MatMul", [data, w], [out], name=f"product_{w}") for data, w, out in pairs]
    nodes.append(oh.make_node("Add", ["q", "t"], ["r"], name="sum"))
    values = [oh.make_tensor_value_info(name, 1, ["batch", WIDTH]) for name in "xr"]
    tensors = [nh.from_array(array, name) for name, array in weights.items()]
    graph = oh.make_graph(nodes, "g", values[:1], values[1:], tensors)
    made: ir.Model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))
    return made


def select(graph: ir.Model, budget: str) -> SelectMatMuls:
    rng = np.random.default_rng(1)
    cases = tuple({"x": rng.standard_normal((5, WIDTH)).astype(np.float32)} for _ in range(2))
    for case in cases:
        case["x"][:, 0] = 0  # what would meet the outlier
    engine = LOAD(graph)
    reference = Reference(cases, tuple(engine.run(case) for case in cases), {"r": 1e-7}, "the graph itself")
    specs = [TensorSpec(name, ir.DataType.FLOAT, ("batch", WIDTH), Role.VALUES) for name in "xr"]
    return SelectMatMuls(Signature((specs[0],), (specs[1],)), lambda: reference, Budget.parse([budget]), LOAD)


def quantizing(text: str) -> QuantizationPass:
    (found,) = Pipeline.parse(text).passes
    assert isinstance(found, QuantizationPass)
    return found


def test_the_dearest_product_comes_first() -> None:
    graph = model(40.0)
    watcher = select(graph, "cosine>=0.999")
    found = losses(
        quantizing("quantize-weights{bits=4 minimum=0}"), graph, watcher.reference().inputs, LOAD, watcher.signature
    )
    assert found[0].product == "product_c"
    assert {loss.product for loss in found} == {f"product_{w}" for w in "abcd"}
    assert found[0].output_error is not None
    assert found[1].output_error is not None
    assert found[0].output_error > 10 * found[1].output_error
    assert all(loss.weights == WIDTH * WIDTH for loss in found)


@pytest.mark.parametrize(
    ("budget", "skipped"),
    [("cosine>=0.2", []), ("cosine>=0.97", ["product_c"]), ("cosine>=0.9999999", [f"product_{w}" for w in "abcd"])],
)
def test_as_few_are_skipped_as_the_budget_needs(budget: str, skipped: list[str]) -> None:
    graph = model(40.0)
    watcher = select(graph, budget)
    outcome = Pipeline.parse("quantize-weights{bits=4 minimum=0}").run(graph, [watcher])
    (applied,) = outcome.applied.passes
    assert isinstance(applied, QuantizationPass)
    assert list(applied.skip) == skipped
    assert not any(decision.rounded for decision in decisions(watcher.found, None))  # the plain lowering
    made = decisions(watcher.found, outcome)
    # Where all are quantized, the error that each makes decides nothing, and is not measured.
    assert [decision.loss.output_error is None for decision in made] == [not skipped] * 4
    products = [decision.loss.product for decision in made]
    assert [decision.loss.product for decision in made if not decision.rounded] == products[: len(skipped)]


def test_huge_outputs_are_compared_by_the_entries_that_the_reference_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.optimizer.runtime.cases._ELEMENTS", 40)
    watcher = select(model(40.0), "cosine>=0.9")
    whole = watcher.reference()
    kept = replace(whole, outputs=tuple(map(thin, whole.inputs, whole.outputs)))
    assert kept.outputs[0]["r"].size < whole.outputs[0]["r"].size
    watcher.reference = lambda: kept
    outcome = Pipeline.parse("quantize-weights{minimum=0}").run(model(40.0), [watcher])
    assert outcome.reports[0].modified


def test_what_later_passes_round_counts_as_well() -> None:
    """MatMulNBits rounds activations, which the graph in front of it does not."""
    text, graph = "quantize-weights{minimum=0}", model(1.0)
    rng = np.random.default_rng(2)
    case = {"x": rng.standard_normal((5, WIDTH)).astype(np.float32)}

    def error(made: ir.Model) -> float:
        return float(np.abs(LOAD(made).run(case)["r"] - LOAD(graph).run(case)["r"]).max())

    alone, both = (error(Pipeline.parse(one).run(graph.clone()).model) for one in (text, f"{text},use-matmul-nbits"))
    assert 1.2 * alone < both
    watcher = select(graph, f"max_abs<={(alone * both) ** 0.5}")
    watcher.reference = lambda: Reference((case,), (LOAD(graph).run(case),), {"r": 1e-7}, "the graph itself")
    outcome = Pipeline.parse(f"{text},use-matmul-nbits").run(graph.clone(), [watcher])
    assert outcome.applied.passes[0].skip  # type: ignore[attr-defined]
    assert error(outcome.model) <= (alone * both) ** 0.5


def test_what_was_written_out_is_left_as_it_is() -> None:
    watcher = select(model(40.0), "cosine>=0.99")
    outcome = Pipeline.parse("quantize-weights{bits=4 minimum=0 skip=[product_a]}").run(model(40.0), [watcher])
    assert str(outcome.applied) == "quantize-weights{minimum=0 skip=[product_a] bits=4}"
    assert not watcher.found


def test_a_budget_with_a_share_of_its_error() -> None:
    given = Budget.parse(["cosine>=0.98", "max_abs<=0.5", "perplexity<=1.02x"])
    assert str(tightened(given, 0.5)) == "cosine>=0.99 max_abs<=0.25 perplexity<=1.01x"


@pytest.mark.slow
def test_a_preset_keeps_what_it_can_and_the_lock_says_what(
    tiny: Path, tmp_path: Path, command: Planish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "presets", {"fast": (Recipe(("quantize-int8{minimum=1}",)),)})
    shape = [{"sequence": 8}]
    free = optimize(tiny, tmp_path / "free", preset="fast", keep=["cosine>=0.9"], shapes=shape, clock=all_faster)
    bound = free.manifest.targets["onnxruntime"].comparison["logits"]["cosine_min"]
    keep = [f"cosine_min>={1 - (1 - bound) / 3:.7f}"]
    built = optimize(
        tiny, tmp_path / "out", preset="fast", keep=keep, shapes=shape, lock=tmp_path / "lock", clock=all_faster
    )
    record = built.manifest.targets["onnxruntime"]
    assert not record.rolled_back
    products = Lock.read(tmp_path / "lock").targets["onnxruntime"].products
    assert {one.rounded for one in products} == {True, False}
    assert [one.product for one in products if not one.rounded] == [one.product for one in products][
        : sum(not one.rounded for one in products)
    ]
    again = optimize(
        tiny, tmp_path / "again", preset="fast", keep=keep, shapes=shape, lock=tmp_path / "lock", clock=all_faster
    )
    assert again.manifest.targets == built.manifest.targets
    said = command("explain", tmp_path / "out", "--pass", "quantize-int8").stdout
    assert f"quantizes {sum(one.rounded for one in products)} of {len(products)} MatMuls" in " ".join(said.split())
    assert "signal over noise" in said
