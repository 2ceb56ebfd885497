"""The real checkpoint, both presets and targets: how close sentence embeddings stay to PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity import engine_outputs, figures_of, inputs, original
from planish.optimizer import Result, optimize
from planish.optimizer.ir.program import Arrays
from tests.clocks import all_faster

pytestmark = pytest.mark.slow
TARGETS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def corpus(minilm: Path) -> tuple[list[Arrays], list[np.ndarray]]:
    """160 natural sentences in padded batches of two, and what PyTorch makes of them."""
    batches = inputs("minilm", 160)
    return batches, original("minilm", batches)


def build(minilm: Path, out: Path, preset: str) -> Result:
    """Engines that are shipped as if they had been faster: here their fidelity counts."""
    return optimize(minilm, out, targets=TARGETS, preset=preset, clock=all_faster)


def test_exact_engines_stay_within_1e_4(minilm: Path, corpus: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    result = build(minilm, tmp_path / "out", "exact")
    for target in TARGETS:
        assert result.manifest.targets[target].rolled_back == []
        found = figures_of(engine_outputs(target, tmp_path / "out" / target, corpus[0]), corpus[1], corpus[0])
        assert found["max_abs"] <= 1e-4
        assert found["neighbour_agreement"] == 1


@pytest.mark.breadth
def test_fast_engines_keep_sentences_and_neighbours(minilm: Path, corpus: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    result = build(minilm, tmp_path / "out", "fast")
    for target in TARGETS:
        assert result.manifest.targets[target].rolled_back == []
        assert result.manifest.targets[target].size_bytes < 65e6  # of 91; the table of words stays in float
        found = figures_of(engine_outputs(target, tmp_path / "out" / target, corpus[0]), corpus[1], corpus[0])
        assert found["mean_cosine"] >= 0.993
        assert found["neighbour_agreement"] >= 0.92
