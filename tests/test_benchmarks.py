"""What the tables of `benchmarks/` say of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import speed, subjects
from planish.optimizer.manifest import Manifest


class Kept:
    """A manifest that remembers only what was shipped."""

    def __init__(self, shipped: dict[str, str]) -> None:
        self.targets = {name: type("Record", (), {"shipped": what}) for name, what in shipped.items()}


def test_an_engine_that_won_nothing_is_called_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {
        "exact": {"onnxruntime": "optimized", "openvino": "plain"},
        "fast": dict.fromkeys(("onnxruntime", "openvino"), "optimized"),
    }
    monkeypatch.setattr(subjects, "ours", lambda name, preset: Path(preset))
    monkeypatch.setattr(Manifest, "read", lambda folder: Kept(shipped[folder.name]))
    monkeypatch.setattr(speed, "plain_exports", lambda name: {"torch.onnx.export": Path("plain.onnx")})
    monkeypatch.setattr(speed, "dynamic_int8", lambda name: Path("int8.onnx"))
    labels = [label for label in speed.field("minilm") if label.startswith("planish")]
    assert labels == [
        "planish exact on onnxruntime",
        "planish exact on openvino (plain)",
        "planish fast on onnxruntime",
        "planish fast on openvino",
    ]
