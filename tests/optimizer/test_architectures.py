"""Every architecture that generates, on both CPU targets, against PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import examine, listed
from tests.zoo import GENERATORS, Species

EVERY_DAY = {"gpt2-text-generation", "llama-text-generation", "t5-text2text-generation"}
"""Species of the fast suite; CI runs them all."""


@pytest.mark.parametrize(
    "species",
    [pytest.param(s, marks=() if s.name in EVERY_DAY else pytest.mark.slow, id=s.name) for s in GENERATORS],
)
def test_engines_generate_as_pytorch_does(species: Species, tmp_path: Path) -> None:
    row = examine(species, tmp_path)
    assert row.green, row
    assert row.name in listed()
