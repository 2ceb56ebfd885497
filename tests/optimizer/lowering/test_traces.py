"""The stored traces that other tests take are what torch exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planish.optimizer.lowering import lower
from planish.optimizer.lowering.export import torch_export
from tests.traces import Traces, export, key_of, packed, unpacked
from tests.zoo import GENERATORS, Species, build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "species",
    [
        Species("bert", "text-classification"),
        next(each for each in GENERATORS if each.model_type == "gpt2"),
        pytest.param(next(each for each in GENERATORS if each.model_type == "t5"), marks=pytest.mark.breadth),
    ],
    ids=lambda species: species.model_type,
)
def test_a_stored_trace_is_what_torch_exports(
    species: Species, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, compared = Traces().stored, []

    def both(module: Any, *call: Any) -> Any:
        if (text := stored.get(key_of(module, *call))) is None:
            pytest.skip("not stored: `pytest --update-traces` with all tests stores it")
        result = packed(module, *export(module, *call))
        compared.append(text == result)
        return unpacked(result)

    monkeypatch.setattr(torch_export, "export", both)
    lower(build(species, tmp_path))
    assert compared
    assert all(compared)


def test_a_key_depends_on_settings_and_not_on_weights(tmp_path: Path) -> None:
    def keys(name: str, species: Species, seed: int) -> list[str]:
        found: list[str] = []

        def note(module: Any, *call: Any) -> Any:
            found.append(key_of(module, *call))
            return traces.export(module, *call)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_export, "export", note)
            lower(build(species, tmp_path / name, seed))
        return found

    traces = Traces()
    bert = Species("bert", "text-classification")
    other = Species("bert", "text-classification", {"layer_norm_eps": 1e-3})
    assert keys("one", bert, 0) == keys("another", bert, 1)
    assert keys("one", bert, 0) != keys("settings", other, 0)
