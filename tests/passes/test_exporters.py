"""Whatever exporter wrote it: every block is raised to the standard's operators, and computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.optimizer.bisecting import Trial
from planish.optimizer.compare import Budget
from planish.optimizer.pipeline import Pipeline
from tests import exporters

FILES = dict(exporters.stored())


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_block_is_raised(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(FILES[name])
    model, trial = Trial.of(path, Budget.parse([]))
    pipeline = Pipeline.preset("exact", target="openvino")
    model = pipeline.run(model).model
    assert trial.violations(model, pipeline.passes) == []
    expected = exporters.block_of(name).expected
    assert {op: exporters.counts(model)[op] for op in expected} == expected


@pytest.mark.parametrize("block", exporters.BLOCKS, ids=lambda block: block.model_type)
def test_no_exporter_is_missing(block: exporters.Block) -> None:
    ways = [str(e) for e in exporters.EXPORTERS if not (block.spelled and e.attention == "sdpa")]
    there = [name.partition(" ")[2] for name in FILES if exporters.block_of(name) is block]
    assert there == [way for way in ways if way not in block.unknown]
