"""Every architecture that generates or sees, on both CPU targets, against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import examine, listed, look
from tests.zoo import GENERATORS, IMAGES, Species

EVERY_DAY = {
    "llama-text-generation",
    "vit-image-classification", "convnext-feature-extraction",
}  # fmt: skip
"""Species that stand for the others, which are left to `make breadth`."""


def marked(zoo: Sequence[Species]) -> list[Any]:
    def mark(species: Species) -> Any:
        return pytest.mark.slow if species.name in EVERY_DAY else pytest.mark.breadth

    return [pytest.param(species, marks=mark(species), id=species.name) for species in zoo]


@pytest.mark.slow
@pytest.mark.parametrize("species", marked(GENERATORS))
def test_engines_generate_as_pytorch_does(species: Species, tmp_path: Path) -> None:
    row = examine(species, tmp_path)
    assert row.green, row
    assert (row.name, row.task) in listed()


@pytest.mark.slow
@pytest.mark.parametrize("species", marked(IMAGES))
def test_engines_see_as_pytorch_does(species: Species, tmp_path: Path) -> None:
    row = look(species, tmp_path)
    assert row.green, row
    assert (row.name, row.task) in listed()
