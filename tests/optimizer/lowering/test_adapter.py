"""PEFT adapters are merged as peft merges them, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.checkpoint.checkpoint import bind, loaded, open_checkpoint, skeleton
from tests.clocks import all_equal
from tests.conftest import Planish
from tests.zoo import GENERATORS, build

TURNED = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
"""The layers of GPT-2 store their weights the other way round."""
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("gpt2", "LoraConfig", TURNED),
    "rslora": (
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "down_proj"], "use_rslora": True,
            "alpha_pattern": {"q_proj": 5}, "rank_pattern": {"down_proj": 2},
        },
    ),
    "dora": ("llama", "LoraConfig", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "dora-turned": ("gpt2", "LoraConfig", {**TURNED, "use_dora": True}),
    "adalora": (
        "llama",
        "AdaLoraConfig",
        {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2},
    ),
    "embedding-and-head": (
        "llama",
        "LoraConfig",
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


def base(name: str, folder: Path) -> Path:
    return build(next(species for species in GENERATORS if species.model_type == name), folder / "base")


def adapter(checkpoint: Path, config: str, options: dict[str, Any], folder: Path) -> Path:
    """An adapter with drawn weights, as peft saves it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"lora_alpha": 8, **({} if config.startswith("Ada") else {"r": 3}), **options}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), getattr(peft, config)(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_peft_merges(kind: str, tmp_path: Path) -> None:
    name, config, options = KINDS[kind]
    checkpoint = base(name, tmp_path)
    opened = open_checkpoint(checkpoint, "text-generation", adapter(checkpoint, config, options, tmp_path))
    model = skeleton(opened)
    merged, plain = bind(model, opened).stored, bind(model, open_checkpoint(checkpoint, "text-generation")).stored
    expected = loaded(opened).state_dict()
    for parameter, stored in merged.items():
        np.testing.assert_allclose(stored.read(), expected[parameter].numpy(), rtol=0, atol=1e-7)
    assert sum(bool((merged[key].read() != plain[key].read()).any()) for key in merged) >= 2


@pytest.mark.slow
def test_an_engine_with_an_adapter_equals_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = base("gpt2", tmp_path)
    folder = adapter(checkpoint, "LoraConfig", TURNED, tmp_path)
    result = optimize(checkpoint, tmp_path / "out", task="text-generation", adapter=folder, clock=all_equal)
    assert result.manifest.targets["onnxruntime"].comparison["generation.next token"]["greedy"] == 1
    assert "adapter_model.safetensors" in result.manifest.source.files


def edited(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = base("llama", folder)
    return checkpoint, adapter(checkpoint, "LoraConfig", {"target_modules": ["q_proj"]}, folder)


def copied(pair: tuple[Path, Path], folder: Path) -> Path:
    made = folder / "adapter"
    made.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / name).write_bytes((pair[1] / name).read_bytes())
    return made


def test_an_adapter_for_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = copied(pair, tmp_path)
    tensors = load_file(made / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.9"): t for name, t in tensors.items()}, made / "adapter_model.safetensors"
    )
    with pytest.raises(BadInput, match=r"changes 'model\.layers\.9.*does not have"):
        lower(pair[0], "text-generation", adapter=made)
    save_file(
        {name: np.ascontiguousarray(t[:, :-1]) if "lora_A" in name else t for name, t in tensors.items()},
        made / "adapter_model.safetensors",
    )
    with pytest.raises(BadInput, match=r"has shape \[32, 23\], the base has \[32, 24\]"):
        lower(pair[0], "text-generation", adapter=made)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING are not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(
    changes: dict[str, object], says: str, pair: tuple[Path, Path], tmp_path: Path, command: Planish
) -> None:
    made = copied(pair, tmp_path)
    edited(made, **changes)
    options = ("--task", "text-generation", "--adapter", made)
    done = command("optimize", pair[0], "-o", tmp_path / "out", *options)
    assert done.returncode == 3, done.stderr
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_adapter_as_a_pickle_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = copied(pair, tmp_path)
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    with pytest.raises(BadInput, match=r"no adapter_model\.safetensors.*safe_serialization"):
        lower(pair[0], "text-generation", adapter=made)


def test_an_adapter_needs_a_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="merged into a checkpoint"):
        lower(tmp_path / "m.onnx", adapter=pair[1])
