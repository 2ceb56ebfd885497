"""What the tables of `benchmarks/` say of an engine."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from benchmarks import exact, speed, subjects
from planish.optimizer.ir.program import Role, Signature, TensorSpec
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.timing.interleaved import Timing


class Kept:
    """A manifest that remembers only what was shipped."""

    def __init__(self, shipped: dict[str, str]) -> None:
        self.targets = {name: type("Record", (), {"shipped": what, "target": name}) for name, what in shipped.items()}


def test_an_engine_that_won_nothing_is_called_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {
        "exact": {"onnxruntime": "optimized", "openvino": "plain"},
        "fast": dict.fromkeys(("onnxruntime", "openvino"), "optimized"),
        "small": {"onnxruntime": "plain", "openvino": "optimized"},
        "fast, no data": {"onnxruntime": "optimized", "openvino": "plain"},
    }
    monkeypatch.setattr(subjects, "ours", lambda name, preset: Path(preset))
    monkeypatch.setattr(Manifest, "read", lambda folder: Kept(shipped[folder.name]))
    monkeypatch.setattr(speed, "plain_exports", lambda name: {"torch.onnx.export": Path("plain.onnx")})
    for peer in ("dynamic_int8", "vnni_int8", "nncf_int8"):
        monkeypatch.setattr(speed, peer, lambda name: Path("int8.onnx"))
    labels = [label for label in speed.field("minilm") if label.startswith("planish")]
    assert labels == [
        "planish exact on onnxruntime",
        "planish exact on openvino (plain)",
        "planish fast on onnxruntime",
        "planish fast on openvino",
        "planish small on onnxruntime (plain)",
        "planish small on openvino",
        "planish fast, no data on onnxruntime",
        "planish fast, no data on openvino (plain)",
    ]


def test_batches_are_padded_to_mixed_lengths_on_the_side_that_a_decoder_wants() -> None:
    ids = TensorSpec("input_ids", ir.DataType.INT64, ("batch", "sequence"), Role.TOKENS, bound=50)
    mask = TensorSpec("attention_mask", ir.DataType.INT64, ("batch", "sequence"), Role.MASK)
    past = TensorSpec("past_key_values.0.key", ir.DataType.FLOAT, ("batch", 2, "past", 4), Role.CACHE)
    read = exact.case_of(Signature((ids, mask), ()), 3, 8, behind=False)
    assert read["attention_mask"].sum(axis=1).tolist() == [8, 5, 2]
    assert read["attention_mask"][:, 0].tolist() == [1, 1, 1]
    written = exact.case_of(Signature((ids, mask, past), ()), 3, 8, behind=True)
    assert written["attention_mask"].sum(axis=1).tolist() == [9, 6, 3]
    assert written["attention_mask"][:, 0].tolist() == [1, 0, 0]
    assert written["past_key_values.0.key"].shape == (3, 2, 8, 4)


def test_the_best_peer_is_the_fastest_that_is_as_exact() -> None:
    turns = {"planish exact": [[10.0]], "peer": [[9.0]], "slow": [[12.0]]}
    over = {label: Timing(10.0, ratio, ratio, ratio, 1) for label, ratio in {"peer": 0.9, "slow": 1.2}.items()}
    cell = exact.Cell(turns, over, {}, 1.0)
    assert (cell.best(), cell.over_best().speedup) == ("peer", 0.9)
