"""Deep stacks: what is written for layers that were not traced computes what the whole trace computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer.fidelity.inputs import make_inputs
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Program
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.components import component
from planish.optimizer.lowering.export.layer_stacks import Stack, find_stacks
from tests.zoo import Species, build

_WRITER = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def _writer(model_type: str, layers: int, **config: Any) -> Species:
    return Species(model_type, "text-generation", {**_WRITER, "num_hidden_layers": layers, **config})


TURNS = {
    "equal": (_writer("llama", 6), 3),
    "windows": (_writer("gemma2", 9, head_dim=10, sliding_window=8, query_pre_attn_scalar=10), 5),
    "local and global positions": (
        _writer("gemma3_text", 12, head_dim=10, sliding_window=8, query_pre_attn_scalar=10, sliding_window_pattern=3),
        9,
    ),
    "dense before experts": (
        _writer("deepseek_v3", 7, **_EXPERTS, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1,
                n_shared_experts=1, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                qk_nope_head_dim=6, v_head_dim=6),
        5,
    ),
    "experts every second time": (
        _writer("qwen2_moe", 10, **_EXPERTS, num_experts=4, decoder_sparse_step=2, shared_expert_intermediate_size=16),
        6,
    ),
    "positions in three of four": (_writer("smollm3", 14, no_rope_layer_interval=4), 10),
    "an encoder's windows": (
        Species("modernbert", "feature-extraction", {"num_hidden_layers": 10, "global_attn_every_n_layers": 2,
                                                     "local_attention": 8, "pad_token_id": 0}),
        6,
    ),
}  # fmt: skip
"""What takes turns, and how many layers are then traced."""


@pytest.mark.breadth
@pytest.mark.parametrize("name", list(TURNS))
def test_copies_compute_what_the_whole_trace_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    species, traced = TURNS[name]
    checkpoint = build(species, tmp_path / "checkpoint")
    short = lower(checkpoint).program
    monkeypatch.setattr(component, "find_stacks", lambda *_, **__: [])
    whole = lower(checkpoint).program
    layers = short.sole()[0].graph
    written = {match[1] for node in layers if (match := re.search(r"_layer(\d+)$", node.name or ""))}
    assert len(written) == species.config["num_hidden_layers"] - traced
    assert len(list(whole.sole()[0].graph)) >= len(list(layers))
    assert set(layers.initializers) == set(whole.sole()[0].graph.initializers)
    assert short.sole()[1] == whole.sole()[1]
    for ours, theirs in zip(_answers(short), _answers(whole), strict=True):
        assert ours.keys() == theirs.keys()
        for output in ours:
            np.testing.assert_array_equal(ours[output], theirs[output])


def _answers(program: Program) -> list[dict[str, np.ndarray]]:
    model, signature = program.sole()
    engine = registry.backend("onnxruntime").load(model)
    return [dict(engine.run(case)) for case in make_inputs(signature)]


def _stack(kinds: str, *, sharing: bool = False) -> list[Stack]:
    """The stacks of a module with a layer for each letter: `a` and `b` differ in a number, `c` in what it is made of."""
    import torch

    made: dict[str, Any] = {
        "a": lambda: torch.nn.Dropout(0.1),
        "b": lambda: torch.nn.Dropout(0.2),
        "c": lambda: torch.nn.Linear(2, 2),
    }
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList([made[kind]() for kind in kinds])
    return find_stacks(root, sharing=sharing)


@pytest.mark.parametrize(
    ("kinds", "sharing", "traced", "period"),
    [
        ("aaaaaa", False, 2, 1),
        ("aaaaaa", True, 3, 1),
        ("baaaaa", False, 3, 1),
        ("bbbaaaaaaaaa", False, 5, 1),
        ("abababab", False, 4, 2),
        ("ababababa", False, 5, 2),
        ("abababab", True, 6, 2),
        ("bbabababababab", False, 6, 2),
        ("acacacacac", True, 6, 2),
        ("aacaacaacaacaac", True, 9, 3),
        ("aacaacaacaacaac", False, 6, 3),
    ],
)
def test_the_fewest_layers_that_show_every_kind_and_its_repetition(
    kinds: str, sharing: bool, traced: int, period: int
) -> None:
    assert _stack(kinds, sharing=sharing) == [Stack("layers", len(kinds), traced, period)]


@pytest.mark.parametrize("kinds", ["aaaa", "abbaab", "aaaaab", "ababa", "aaaaaaaabb", "abcabacabcb"])
def test_stacks_that_do_not_repeat_often_enough_are_traced_whole(kinds: str) -> None:
    assert _stack(kinds) == []


def test_what_the_configuration_lists_for_layers_tells_them_apart() -> None:
    """Nothing in the layers shows which mask the model hands them."""
    import torch
    from transformers import PretrainedConfig

    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(8)])
    root.config = PretrainedConfig(layer_types=["full_attention", "sliding_attention"] * 4)
    assert find_stacks(root) == [Stack("layers", 8, 4, 2)]


def test_numbers_of_layers_are_whole_numbers() -> None:
    stack = Stack("layers", 30, 4, 2)
    assert stack.shifted("module.layers.1.weight", 10) == "module.layers.11.weight"
    assert stack.shifted("['', 'module.layers.12', 'module.layers.12.mlp.layers.12']", 2) == (
        "['', 'module.layers.14', 'module.layers.14.mlp.layers.12']"
    )
    assert stack.shifted("module.other.layers.1.weight", 10) == "module.other.layers.1.weight"
    assert stack.number_of("module.layers.12.weight") == 12
    assert stack.number_of("module.embedding.weight") is None
