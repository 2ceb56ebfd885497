"""Presets: the recipes of backends, by the case in which they are tried."""

from __future__ import annotations

import pytest

from planish.backends import BACKENDS
from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer.compilation.options import BuildOptions
from planish.optimizer.compilation.request import Request, request_of
from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces.recipe import CANONICAL, LAST, Recipe, When
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.pipeline import Pipeline

RACES = {"fast": {"onnxruntime", "openvino"}}
"""Targets with recipes that race, by preset."""


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_recipes_begin_and_end_alike_and_race_for_speed_alone(preset: str, target: str) -> None:
    for when in set(When) - {When.PADDED}:
        for recipe in presets.recipes(preset, target, when):
            assert recipe.passes[: len(CANONICAL)] == CANONICAL
            assert recipe.passes[-1] == LAST
    for when in (When.CALIBRATED, When.GENERATING):
        assert bool(presets.recipes(preset, target, when)) == (target in RACES.get(preset, ()))


def test_a_backend_without_recipes_gets_what_every_target_shares() -> None:
    assert presets.pipeline_text("fast", "of no target") == ",".join([*CANONICAL, LAST])
    assert not presets.recipes("fast", "of no target", When.CALIBRATED)
    with pytest.raises(UsageError, match=r"unknown preset 'fats' \(did you mean 'fast'\?\)"):
        presets.pipeline_text("fats", "onnxruntime")


def request(*, texts: int = 1, calibrated: bool = False, preset: str | None = "fast") -> Request:
    options = BuildOptions(
        targets=("onnxruntime", "openvino"),
        preset=preset,
        pipeline=None if preset else "fuse-gelu",
        shapes=[{"batch": texts}],
    )
    return request_of(options, calibrated=calibrated)


def test_what_is_tried_behind_is_the_backends_own_if_it_brings_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Recipe(("fuse-gelu",), When.PADDED)
    monkeypatch.setattr(OnnxRuntime, "presets", {"fast": (Recipe(("fold-constants",)), own)})
    tried = {name: str(pipeline) for name, pipeline in request(texts=2).extras.items()}
    assert tried == {"onnxruntime": "fuse-gelu", "openvino": "remove-padding"}
    assert not any(pipeline.passes for pipeline in request().extras.values())
    assert not any(pipeline.passes for pipeline in request(texts=2, preset=None).extras.values())


def test_calibration_data_bring_recipes_of_their_own() -> None:
    without, informed = request(), request(calibrated=True)
    assert without.pipelines == informed.pipelines
    assert not without.alternatives["onnxruntime"]
    (grouped,) = without.alternatives["openvino"]
    assert "group-activations" in str(grouped)
    assert grouped in informed.alternatives["openvino"]
    (fixed_steps,) = informed.alternatives["onnxruntime"]
    assert "activations=static" in str(fixed_steps)
    (in_four_bits,) = without.stepping["openvino"]
    assert in_four_bits == Pipeline.parse(str(presets.recipes("fast", "openvino", When.GENERATING)[0]))
