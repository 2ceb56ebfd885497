"""A decoder's first step: the empty cache that a loader makes may have any heads of any size (decision 18)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.errors import BadInput
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.kv_cache import empty_cache
from planish.optimizer.ir.program import Role
from planish.optimizer.lowering import lower
from planish.optimizer.pipeline.presets import pipeline_text
from tests.zoo import GENERATORS, Species, build

DECODERS = [species for species in GENERATORS if species.task == "text-generation"]
EVERY_DAY = {"gemma2"}
"""A loader guesses both its heads and their size wrong."""
TARGETS = ("onnxruntime", "onnxruntime{cache=int8}", "openvino")
HEADS_AND_SIZES = ((1, 1), (3, 8), (4, 6), (5, 7), (0, 0))
ROWS, TOKENS = 2, 3


def every_day(species: Species) -> Any:
    marks = () if species.model_type in EVERY_DAY else pytest.mark.breadth
    return pytest.param(species, marks=marks, id=species.model_type)


@pytest.mark.slow
@pytest.mark.parametrize("species", [every_day(species) for species in DECODERS])
def test_an_empty_cache_of_any_heads_changes_nothing(species: Species, tmp_path: Path) -> None:
    program = lower(build(species, tmp_path / "checkpoint")).program
    prompt = {
        "input_ids": np.random.default_rng(0).integers(4, 90, (ROWS, TOKENS)),
        "attention_mask": np.ones((ROWS, TOKENS), np.int64),
    }
    for target in TARGETS:
        backend = registry.backend(target)
        for preset in ("plain", "exact"):
            model = program.components["model"].clone()
            if preset == "exact":
                model = Pipeline.parse(pipeline_text("exact", backend.name)).run(model).model
            folder = tmp_path / f"{target}-{preset}"
            folder.mkdir()
            backend.emit(replace(program, components={"model": model}), folder)
            engine = backend.open(folder)
            caches = [tensor for tensor in engine.inputs if tensor.role is Role.CACHE]
            wanted = engine.run(prompt | {tensor.name: empty_cache(tensor, prompt) for tensor in caches})
            for heads, size in HEADS_AND_SIZES:
                empty = {t.name: np.zeros((ROWS, heads, 0, size), t.numpy_dtype()) for t in caches}
                results = engine.run(prompt | empty)
                for name, array in wanted.items():
                    np.testing.assert_array_equal(results[name], array, err_msg=f"{target} {preset} {name}")
            with pytest.raises(BadInput):
                engine.run(prompt | {t.name: np.ones((ROWS, 5, 2, 7), t.numpy_dtype()) for t in caches})
