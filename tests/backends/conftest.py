"""A lowered program that all backends write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planish.optimizer import Pipeline
from planish.optimizer.ir.program import Program
from planish.optimizer.lowering import lower
from planish.optimizer.pipeline import presets
from tests.zoo import Species, build


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A tiny encoder, optimized for no target in particular; its word table alone is larger than one MiB."""
    wide = Species("bert", "feature-extraction", {"vocab_size": 12_000})
    lowered = lower(build(wide, tmp_path_factory.mktemp("program") / "checkpoint")).program
    optimized = Pipeline.parse(presets.pipeline_text("exact", "tensorrt")).run(lowered.sole()[0])
    return replace(lowered, components={"model": optimized.model})


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
