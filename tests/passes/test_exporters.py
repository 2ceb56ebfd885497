"""Whatever exporter wrote it: every block is raised to the standard's operators, and computes what it did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planish.optimizer.compilation.references import file_reference
from planish.optimizer.driver.bisect import Oracle
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.lowering import lower
from planish.optimizer.pipeline.pipeline import Pipeline
from tests import exporters

FILES = dict(exporters.stored())
EVERY_DAY = "torchscript 14 eager"
"""The exporter whose files need most to be raised."""
RESEMBLING = {"gemma2", "gemma", "mistral", "qwen2", "mistral-with-past", "gpt2-with-past", "falcon", "qwen3", "llama"}
"""Blocks whose parts other blocks have as well; with the other exporters, `make breadth` has them."""
LONGEST = 12
"""Tokens of a text: no model has fewer positions."""


def marked(name: str) -> Any:
    block, _, exporter = name.partition(" ")
    usual = exporter == EVERY_DAY and block not in RESEMBLING
    return pytest.param(name, marks=pytest.mark.slow if usual else pytest.mark.breadth)


@pytest.mark.slow
@pytest.mark.parametrize("name", map(marked, FILES))
def test_every_block_is_raised(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(FILES[name])
    lowered = lower(path)
    model, signature = lowered.program.sole()
    axes = {name: replace(axis, maximum=LONGEST) for name, axis in signature.axes.items()}
    lowered.program.signatures["model"] = replace(signature, axes=axes)
    reference = file_reference(lowered)
    trial = Oracle(lowered.program.signatures["model"], reference, reference.exact_budget(), Budget.parse([]))
    pipeline = Pipeline.preset("exact", target="of no target")  # what all share
    model = pipeline.run(model).model
    assert trial.violations(model, pipeline.passes) == []
    expected = exporters.block_of(name).expected_of(name)
    assert {op: exporters.counts(model)[op] for op in expected} == expected


@pytest.mark.parametrize("block", exporters.BLOCKS, ids=lambda block: block.name)
def test_no_exporter_is_missing(block: exporters.Block) -> None:
    ways = [str(e) for e in exporters.EXPORTERS if not (block.spelled and e.attention == "sdpa")]
    there = [name.partition(" ")[2] for name in FILES if exporters.block_of(name) is block]
    assert there == [way for way in ways if way not in block.unknown]
