"""A table that the head is tied to lies on disk once, within a component and across components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planish.optimizer import Pipeline
from planish.optimizer.fidelity.inputs import make_inputs
from planish.optimizer.interfaces import registry
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.program import Program
from planish.optimizer.lowering import lower
from planish.optimizer.pipeline import presets
from tests.zoo import GENERATORS, build

pytestmark = pytest.mark.slow

_VOCABULARY, _WIDTH = 3000, 24


def _lowered(model_type: str, folder: Path, **config: Any) -> Program:
    from dataclasses import replace

    species = next(species for species in GENERATORS if species.model_type == model_type)
    wanted = replace(species, config={**species.config, "vocab_size": _VOCABULARY, **config})
    return lower(build(wanted, folder)).program


def _shared(program: Program) -> Program:
    from dataclasses import replace

    step = Pipeline.parse("share-transposed-weights")
    return replace(program, components={name: step.run(m.clone()).model for name, m in program.components.items()})


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_tied_head_is_stored_once_and_gives_the_same_scores(target: str, tmp_path: Path) -> None:
    program = _lowered("gpt2", tmp_path / "checkpoint")
    backend = registry.backend(target)
    sizes, answers = [], []
    for name, wanted in (("two", program), ("once", _shared(program))):
        folder = tmp_path / name
        folder.mkdir()
        backend.emit(wanted, folder)
        sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
        engine = backend.open(folder)
        answers.append([engine.run(case)["logits"] for case in make_inputs(program.sole()[1])])
    assert sizes[0] - sizes[1] > 0.99 * _VOCABULARY * _WIDTH * 4
    for one, other in zip(*answers, strict=True):
        assert abs(one - other).max() <= 1e-5 * abs(one).max()


def test_components_share_the_table_in_one_file(tmp_path: Path) -> None:
    program = _lowered("t5", tmp_path / "checkpoint")
    sizes = []
    for name, wanted in (("two", program), ("once", _shared(program))):
        (tmp_path / name).mkdir()
        onnx_io.save_together({f"{n}.onnx": model for n, model in wanted.components.items()}, tmp_path / name)
        sizes.append((tmp_path / name / onnx_io.SHARED_DATA).stat().st_size)
    assert sizes[0] - sizes[1] > 0.9 * _VOCABULARY * _WIDTH * 4
    assert sizes[1] < 2 * _VOCABULARY * _WIDTH * 4


def test_a_head_that_is_not_tied_keeps_its_matrix(tmp_path: Path) -> None:
    program = _lowered("gpt2", tmp_path / "checkpoint", tie_word_embeddings=False)
    outcome = Pipeline.parse("share-transposed-weights").run(program.sole()[0])
    assert not outcome.reports[0].modified


def test_a_quantized_head_is_quantized_as_before(tmp_path: Path) -> None:
    program = _lowered("gpt2", tmp_path / "checkpoint")
    model = Pipeline.parse(presets.pipeline_text("fast", "onnxruntime")).run(program.sole()[0].clone()).model
    assert [value.name for value in model.graph.initializers.values() if value.name == "lm_head.weight.transposed_int8"]
    computed = [node.inputs[0] for node in model.graph if node.op_type == "Transpose"]
    assert not any(value is not None and value.const_value is not None for value in computed)
