"""Rotary positions whose frequencies follow the length: scores are those of a fresh PyTorch model at every length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays
from planish.optimizer.lowering import lower
from tests.zoo import Species, build

ORIGINAL = 16
"""Tokens up to which the short frequencies hold."""
ROPE: Mapping[str, Mapping[str, Any]] = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 9.0, 16.0],
                 "original_max_position_embeddings": ORIGINAL},
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
}  # fmt: skip


def species(kind: str, model_type: str = "llama") -> Species:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "sliding_window": None}
    length = ORIGINAL if kind == "dynamic" else 64
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {**heads, **ends, "max_position_embeddings": length, "rope_parameters": rope}
    return Species(model_type, "text-generation", config)


def fed(ids: np.ndarray, past: Arrays, empty: Arrays) -> dict[str, np.ndarray]:
    """What an engine takes for these tokens, none padded, behind a past."""
    length = next(iter(past.values())).shape[2] if past else 0
    positions = np.broadcast_to(np.arange(length, length + ids.shape[1]), ids.shape)
    mask = np.ones((len(ids), length + ids.shape[1]), np.int64)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **(past or empty)}


def step(engine: Engine, ids: np.ndarray, past: Arrays) -> tuple[np.ndarray, Arrays]:
    """Scores of the last token, and the cache."""
    empty = {
        t.name: np.zeros((len(ids), int(t.shape[1]), 0, int(t.shape[3])), np.float32)
        for t in engine.inputs
        if t.name.startswith("past_key_values.")
    }
    found = engine.run(fed(ids, past, empty))
    kept = {name.replace("present.", "past_key_values."): a for name, a in found.items() if name.startswith("present.")}
    return found["logits"][:, -1], kept


def fresh(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("longrope", "phi3"),
        ("dynamic", "llama"),
        *(pytest.param(kind, "llama", marks=pytest.mark.breadth) for kind in ("linear", "yarn", "llama3", "longrope")),
        pytest.param("dynamic", "olmo2", marks=pytest.mark.breadth),
    ],
)
def test_scores_are_those_of_pytorch_at_every_length(kind: str, model_type: str, tmp_path: Path) -> None:
    import torch

    folder = build(species(kind, model_type), tmp_path / "checkpoint")
    lowered = lower(folder)
    assert lowered.program.sole()[1].axes["sequence"].maximum == 64
    backend = registry.backend("onnxruntime")
    (tmp_path / "engine").mkdir()
    backend.emit(lowered.program, tmp_path / "engine")
    engine = backend.open(tmp_path / "engine")
    ids = (np.arange(24)[None] * 7) % 90 + 5
    with torch.no_grad():
        for length in (24, 5, 16, 17, 20):  # a shorter text after a longer one: what was seen before does not count
            model = fresh(folder)
            expected = model(input_ids=torch.from_numpy(ids[:, :length])).logits[:, -1].numpy()
            found, _ = step(engine, ids[:, :length], {})
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=f"{length} tokens")
        model, cache = fresh(folder), None
        past: Arrays = {}
        for begin, end in ((0, 9), (9, 14), (14, 15), (15, 16), (16, 17), (17, 18), (18, 24)):
            result = model(input_ids=torch.from_numpy(ids[:, begin:end]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            found, past = step(engine, ids[:, begin:end], past)
            np.testing.assert_allclose(found, result.logits[:, -1].numpy(), rtol=1e-4, atol=2e-5, err_msg=f"to {end}")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_frequencies_change_at_the_original_length(kind: str, tmp_path: Path) -> None:
    """What the other test compares does depend on the length."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = build(species(kind, "llama"), tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    plain = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    ids = (torch.arange(24)[None] * 7) % 90 + 5
    with torch.no_grad():
        short, long = ((fresh(folder)(i).logits - plain(i).logits).abs().max() for i in (ids[:, :16], ids))
    assert long > 1e-2
    assert kind == "longrope" or short < 1e-5  # LongRoPE scales its cosines at every length


@pytest.mark.slow
def test_the_original_forgets_the_texts_before(tmp_path: Path) -> None:
    """transformers keeps the frequencies of the longest text; references are those of a fresh model."""
    lowered = lower(build(species("dynamic"), tmp_path))
    cases = [step_case(length) for length in (20, 40, 20)]
    first, _, again = (answers["logits"] for answers in lowered.original.answer({"model": cases}, 0).outputs["model"])
    np.testing.assert_array_equal(first, again)


def step_case(length: int) -> dict[str, np.ndarray]:
    ids = (np.arange(length)[None] * 7) % 90 + 5
    empty = {
        f"past_key_values.{i}.{kind}": np.zeros((1, 4, 0, 8), np.float32) for i in (0, 1) for kind in ("key", "value")
    }
    return fed(ids, {}, empty)
