"""How long texts may be: what the configuration calls it, and what the tables of positions hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Axis
from planish.optimizer.lowering.checkpoint.checkpoint import open_checkpoint, skeleton
from planish.optimizer.lowering.checkpoint.sequence_limits import limit_axes
from tests.zoo import GENERATORS, ZOO, Species, build

KNOWN = {species.name: species for species in (*GENERATORS, *ZOO)}


def limit_of(species: Species, folder: Path) -> int | None:
    checkpoint = open_checkpoint(build(species, folder), species.task)
    axes = limit_axes({"sequence": Axis("sequence"), PAST: Axis(PAST, 0)}, skeleton(checkpoint), checkpoint)
    longest = axes["sequence"].maximum
    assert axes[PAST].maximum == (None if longest is None else longest - 1)
    return longest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mpt-text-generation", 48),  # max_seq_len
        ("xglm-text-generation", 48),  # a table of sines that is a buffer of 50 rows
        ("m2m_100-text2text-generation", 48),
        ("opt-text-generation", 48),  # a table with two rows more than positions
        ("gpt2-text-generation", 48),  # n_positions
        ("roberta-text-classification", 48),  # a table of 50 rows whose second is padding
    ],
)
def test_limits_come_from_the_model(name: str, expected: int | None, tmp_path: Path) -> None:
    assert limit_of(KNOWN[name], tmp_path) == expected


def test_a_table_shorter_than_the_configuration_says_limits(tmp_path: Path) -> None:
    species = Species(
        "m2m_100", "text2text-generation", {**KNOWN["m2m_100-text2text-generation"].config, "pad_token_id": 5}
    )
    assert limit_of(species, tmp_path) == 44


def test_a_key_that_the_class_does_not_have_is_no_limit(tmp_path: Path) -> None:
    species = Species("mpt", "text-generation", {**KNOWN["mpt-text-generation"].config, "n_positions": 7})
    assert limit_of(species, tmp_path) == 48


@pytest.mark.parametrize("name", ["bloom-text-generation", "t5-text2text-generation"])
def test_relative_positions_know_no_limit(name: str, tmp_path: Path) -> None:
    known = KNOWN[name]
    assert (
        limit_of(Species(known.model_type, known.task, {**known.config, "max_position_embeddings": ...}), tmp_path)
        is None
    )
