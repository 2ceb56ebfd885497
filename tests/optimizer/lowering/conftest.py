"""Tests of lowering trace, where others take stored traces."""

from __future__ import annotations

import pytest

from planish.optimizer.lowering.export import torch_export
from tests.traces import export

TAKE_STORED = {
    *("test_offload", "test_hostile_checkpoints", "test_quantized_weights", "test_adapter", "test_tied"),
    "test_architectures",
}
"""Tests of what is bound to the graph, of the original, and of engines. What `make breadth` adds is not stored."""


@pytest.fixture(autouse=True)
def _traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__.rpartition(".")[2] not in TAKE_STORED:
        monkeypatch.setattr(torch_export, "export", export)
