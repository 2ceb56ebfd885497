"""Selection on values: verdicts and timings are given, and nothing is built or run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest

from planish.optimizer.calibration.sensitivity import Loss
from planish.optimizer.compilation.candidates import Candidate, Emitted, products_of
from planish.optimizer.compilation.job import Checks
from planish.optimizer.compilation.selection import (
    Timed,
    eligible,
    fastest,
    is_faster,
    rank,
    select_untimed,
    timed_selection,
    without_changes,
)
from planish.optimizer.compilation.transform import Transformed
from planish.optimizer.compilation.verdicts import Verdict
from planish.optimizer.fidelity.budget import Budget, Clause
from planish.optimizer.fidelity.engine_check import Fidelity
from planish.optimizer.fidelity.metrics import Comparison
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.interfaces.backend import Backend, Engine
from planish.optimizer.ir.program import Program, Provenance, Signature
from planish.optimizer.pipeline.pipeline import Outcome, PassReport
from planish.optimizer.timing.interleaved import Timing


def timed(*spans: tuple[float, float]) -> dict[str, Timing]:
    """Speed-ups at several shapes, each with the lower end of its interval."""
    return {str(n): Timing(1.0, speedup, low, 2 * speedup - low, 9) for n, (speedup, low) in enumerate(spans)}


def test_one_shape_needs_its_whole_interval() -> None:
    assert is_faster(timed((1.1, 1.01)))
    assert not is_faster(timed((1.1, 0.99)))


@pytest.mark.parametrize("count", [2, 4])
def test_errors_of_shapes_are_independent(count: int) -> None:
    low = 1.1 / math.exp(0.12)  # below one; four such errors add up to twice one of them, their gains to four times
    assert low < 1
    assert is_faster(timed(*[(1.1, low)] * count))
    assert not is_faster(timed(*[(1.0, low)] * count))


def test_a_loss_at_one_shape_counts() -> None:
    assert not is_faster(timed((1.1, 1.09), (0.9, 0.89)))


def test_of_engines_whose_intervals_overlap_the_most_faithful_is_taken() -> None:
    engines = [timed((1.2, 1.15)), timed((1.3, 1.24)), timed((1.4, 1.26))]
    assert fastest(engines, [0.0, 0.2, 0.1]) == 2  # the first is slower with its whole interval
    assert fastest(engines, [0.0, 0.1, 0.2]) == 1
    assert fastest(engines, [0.0, 0.1, 0.1]) == 1


def test_a_faithful_engine_that_may_be_slower_than_plain_is_not_preferred() -> None:
    assert fastest([timed((1.03, 0.99)), timed((1.05, 1.02))], [0.0, 0.1]) == 1
    assert fastest([timed((1.03, 0.99)), timed((1.05, 0.98))], [0.0, 0.1]) == 0


class Fake(Backend):
    """A target whose engines are never opened: timings are given."""

    name: ClassVar[str] = "fake"
    gone: ClassVar[str | None] = None

    def emit(self, program: Program, folder: Path) -> None:
        raise AssertionError("nothing is emitted")

    def open(self, path: Path) -> Engine:
        raise AssertionError("nothing is opened")

    @classmethod
    def missing(cls) -> str | None:
        return cls.gone


class Finer(Fake):
    """The same target in another arithmetic."""


def graph(kind: str = "float") -> ir.Model:
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]> g ({kind}[rows,4] x) => ({kind}[rows,4] y) {{ y = Relu (x) }}"""
    )


NO_BORDER = Signature((), ())
PROGRAM = Program(
    {"encoder": graph(), "decoder": graph()},
    {"encoder": NO_BORDER, "decoder": NO_BORDER},
    "",
    Provenance("onnx", "made here"),
)


def emitted(
    *passes: PassReport,
    tried: str = "",
    worst: float = 0.0,
    model: Callable[[], ir.Model] = graph,
    target: Backend | None = None,
) -> Emitted:
    """A candidate whose components all have these reports; ``worst`` is the error of its outputs, 0.1 is allowed."""
    parts = {name: Transformed("", Outcome(model(), list(passes)), {}, False, ()) for name in PROGRAM.components}
    budget = Budget((Clause("max_abs", "<=", 0.1),))
    fidelity = Fidelity(Parts({"encoder": Comparison({"y": {"max_abs": worst}})}), "fake", 0)
    return Emitted(
        Candidate(tried, parts), target or Fake(), Path(tried or "main"), Verdict(Parts({"encoder": budget}), fidelity)
    )


CHANGED = PassReport("eliminate-identities", "eliminate-identities", modified=True)
MORE = PassReport("remove-unused-nodes", "remove-unused-nodes", modified=True)


def speeds_of(encoder: float, decoder: float) -> Timed:
    """Timings with narrow intervals."""
    return {"encoder": timed((encoder, encoder)), "decoder": timed((decoder, decoder))}


def test_the_plain_lowering_is_shipped_where_nothing_keeps_the_budget() -> None:
    main = emitted(CHANGED, worst=0.5)
    assert eligible([main]) == []
    selection = select_untimed(Fake(), main, Checks.FULL, preset=True, within_budget=False)
    assert selection is not None
    assert selection.shipped == "plain"
    assert selection.why == "outside the budget: max_abs of y is 0.5, the budget asks max_abs<=0.1"


def test_an_alternative_may_win_where_the_main_pipeline_leaves_the_budget() -> None:
    main, other = emitted(CHANGED, worst=0.5), emitted(CHANGED, MORE, tried="remove-unused-nodes")
    assert eligible([main, other]) == [other]


@pytest.mark.parametrize(
    ("passes", "worst", "told"),
    [
        ((CHANGED,), 0.0, "changed nothing: no place for it"),
        ((CHANGED, replace(MORE, modified=False, rolled_back="too far")), 0.0, "undone: too far"),
        ((CHANGED, MORE), 0.5, "outside the budget: max_abs of y is 0.5, the budget asks max_abs<=0.1"),
        ((CHANGED, MORE), 0.0, None),
    ],
)
def test_why_an_alternative_cannot_win(passes: tuple[PassReport, ...], worst: float, told: str | None) -> None:
    assert emitted(*passes, tried="other", worst=worst).obstacle(emitted(CHANGED)) == told


@pytest.mark.parametrize(
    ("checks", "preset", "shipped", "why"),
    [
        (Checks.NONE, True, "plain", "NOT CHECKED, and not measured"),
        (Checks.NONE, False, "optimized", "NOT CHECKED, and not measured"),
        (Checks.OFFLOAD, True, "plain", "not measured, passes not compared one by one: weights stay in their files"),
        (Checks.OFFLOAD, False, "optimized", "not measured, passes not compared one by one: weights stay in their files"),
    ],
)  # fmt: skip
def test_without_a_clock_a_preset_ships_the_plain_lowering(
    checks: Checks, preset: bool, shipped: str, why: str
) -> None:
    selection = select_untimed(Fake(), emitted(CHANGED), checks, preset=preset, within_budget=True)
    assert selection is not None
    assert (selection.shipped, selection.why) == (shipped, why)


def test_what_the_target_cannot_run_here_is_shipped_as_it_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_untimed(Fake(), emitted(CHANGED), Checks.FULL, preset=True, within_budget=True) is None
    monkeypatch.setattr(Fake, "gone", "no such runtime")
    selection = select_untimed(Fake(), emitted(CHANGED), Checks.FULL, preset=True, within_budget=True)
    assert selection is not None
    assert (selection.shipped, selection.why) == ("optimized", "not measured: no such runtime")


def test_each_component_comes_from_the_candidate_that_is_fastest_there() -> None:
    main, other = emitted(CHANGED), emitted(CHANGED, MORE, tried="other")
    ranking = rank(PROGRAM, Fake(), [main, other], [speeds_of(1.5, 1.2), speeds_of(1.2, 1.5)])
    assert ranking.winners == {"encoder": main, "decoder": other}
    only = rank(PROGRAM, Fake(), [main, other], [speeds_of(1.5, 0.9), speeds_of(1.2, 0.8)])
    assert only.winners == {"encoder": main}
    selection = timed_selection(Fake(), main.candidate, only, [main, other], {"other": speeds_of(1.2, 0.8)})
    assert selection.why == "faster than the plain lowering; left plain: decoder"
    assert [(trial.passes, trial.kept, trial.why) for trial in selection.tried] == [
        ("other", False, "not measurably faster than without")
    ]


def test_components_with_other_inputs_come_from_one_candidate() -> None:
    """A decoder whose cache is stored in another type needs the encoder that was made with it."""
    main = emitted(CHANGED)
    other = emitted(CHANGED, MORE, tried="other", model=lambda: graph("float16"))
    ranking = rank(PROGRAM, Fake(), [main, other], [speeds_of(1.5, 1.2), speeds_of(1.1, 2.0)])
    assert all(winner is other for winner in ranking.winners.values())
    assert list(ranking.winners) == list(PROGRAM.components)
    assert rank(PROGRAM, Fake(), [other], [speeds_of(1.5, 0.5)]).winners == {}


def test_components_of_another_arithmetic_come_from_one_candidate() -> None:
    """An engine folder is opened in one arithmetic: no component can be that of the plain engine then."""
    main = emitted(CHANGED, target=Finer())
    assert rank(PROGRAM, Fake(), [main], [speeds_of(1.5, 0.9)]).winners == {"encoder": main, "decoder": main}
    assert rank(PROGRAM, Finer(), [main], [speeds_of(1.5, 0.9)]).winners == {"encoder": main}


def test_an_engine_that_no_pass_changed_is_plain_whatever_the_clock_says() -> None:
    main = emitted(replace(CHANGED, modified=False))
    ranking = rank(PROGRAM, Fake(), [main], [speeds_of(1.5, 1.5)])
    selection = without_changes(timed_selection(Fake(), main.candidate, ranking, [main], {}))
    assert (selection.shipped, selection.why) == ("plain", "no pass changed anything")


def test_what_quantization_chose_among_is_kept_with_what_was_shipped() -> None:
    text = "quantize-int8{minimum=1}"
    losses = {text: [Loss("a", "layer.0", 0.1, 0.2, 16), Loss("b", "layer.1", 0.01, 0.02, 16)]}
    report = PassReport("quantize-int8", "quantize-int8{minimum=1 skip=[a]}", modified=True)
    part = Transformed(text, Outcome(graph(), [report]), losses, False, ())
    candidate = Candidate("", {"encoder": part})
    assert [(one.product, one.rounded) for one in products_of([candidate], candidate)] == [("a", False), ("b", True)]
    assert not any(one.rounded for one in products_of([candidate], None))
    elsewhere = Candidate("other", {"encoder": replace(part, recipe="another pipeline")})
    assert not any(one.rounded for one in products_of([candidate], elsewhere))
