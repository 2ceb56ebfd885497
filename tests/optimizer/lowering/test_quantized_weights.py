"""Quantized checkpoints: GPTQ, AWQ and FP8 are read as the floats that they stand for, the others refused at once.

The packers here are written after those that make such files (AutoGPTQ's `QuantLinear.pack`, AutoAWQ's
`WQLinear_GEMM.from_linear`, the FP8 files of DeepSeek and Qwen3), one code at a time, with loops instead of our shifts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.checkpoint import quantized_weights
from planish.optimizer.lowering.checkpoint.checkpoint import bind, loaded, open_checkpoint, skeleton
from planish.optimizer.lowering.original.offload import offloaded
from tests.clocks import all_equal
from tests.zoo import Species, build

LAYERS = Species(
    "qwen3",
    "text-generation",
    {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
     "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
)  # fmt: skip
Tensors = dict[str, torch.Tensor]
Quantizer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Packs a weight (out, in); gives the tensors of the file, and the weight that they stand for."""


def signed(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (count, columns) as words (count · bits / 32, columns): their bits one behind the other, the lowest first."""
    words = np.zeros((len(codes) * bits // 32, codes.shape[1]), np.uint64)
    for place in range(len(codes) * bits):
        code, bit = divmod(place, bits)
        words[place // 32] |= ((codes[code].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(
            place % 32
        )
    return words


def grid(weight: torch.Tensor, groups: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Codes (out, in), scales and zero points (groups, out) of a weight."""
    count, most = int(groups.max()) + 1, 2**bits - 1
    scales, zeros = np.zeros((count, len(weight)), np.float16), np.zeros((count, len(weight)), np.int64)
    codes = np.zeros(tuple(weight.shape), np.int64)
    for group in range(count):
        part = weight[:, groups == group].double().numpy()
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[group] = (high - low) / most
        zeros[group] = (most + 1) // 2 if symmetric else np.rint(-low / scales[group]).clip(0, most)
        wide = scales[group].astype(np.float64)[:, None]
        codes[:, groups == group] = (np.rint(part / wide) + zeros[group][:, None]).clip(0, most)
    return codes, scales, zeros


def stands_for(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: torch.Tensor) -> torch.Tensor:
    """The formula, element by element."""
    found = np.zeros(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column, group in enumerate(groups.tolist()):
            code = np.float32(codes[row, column] - zeros[group, row])
            found[row, column] = np.float32(scales[group, row]) * code
    return torch.from_numpy(found)


def gptq(bits: int, *, version: int = 1, symmetric: bool = False, order: bool = False, size: int = 32) -> Quantizer:
    def pack(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = torch.arange(weight.shape[1]) // size
        if order:  # desc_act: columns are quantized by their importance, and their groups are all over
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(len(name)))]
        codes, scales, zeros = grid(weight, groups, bits, symmetric=symmetric)
        kept = (zeros - (version == 1)) % 2**bits
        tensors = {
            f"{name}.qweight": signed(stream(codes.T, bits)),
            f"{name}.qzeros": signed(stream(kept.T, bits).T),
            f"{name}.scales": torch.from_numpy(scales),
            f"{name}.g_idx": groups.int(),
        }
        return tensors, stands_for(codes, scales, zeros, groups)

    return pack


def awq(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    groups = torch.arange(weight.shape[1]) // 32
    codes, scales, zeros = grid(weight, groups, 4, symmetric=False)

    def packed(matrix: np.ndarray) -> torch.Tensor:
        words = np.zeros((len(matrix), matrix.shape[1] // 8), np.int64)
        for column in range(words.shape[1]):
            for place, neighbour in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= matrix[:, column * 8 + neighbour] << (place * 4)
        return signed(words)

    parts = {"qweight": packed(codes.T), "qzeros": packed(zeros), "scales": torch.from_numpy(scales)}
    return {f"{name}.{key}": value for key, value in parts.items()}, stands_for(codes, scales, zeros, groups)


def float8(block: tuple[int, int] | None, suffix: str = "weight_scale_inv") -> Quantizer:
    """Blocks of this size; (1, 0) is one a row, None one for all."""

    def pack(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        high, wide = block or tuple(weight.shape)
        wide = wide or weight.shape[1]
        rows, columns = -(-weight.shape[0] // high), -(-weight.shape[1] // wide)
        scales, codes = torch.zeros(rows, columns), torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        found = torch.zeros_like(weight)
        for row in range(rows):
            for column in range(columns):
                part = (slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide))
                scales[row, column] = weight[part].abs().max() / 448
                codes[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
                found[part] = codes[part].float() * scales[row, column]
        kept = scales.reshape(()) if block is None else scales
        return {f"{name}.weight": codes, f"{name}.{suffix}": kept}, found

    return pack


def described(method: str, **settings: Any) -> dict[str, Any]:
    return {"quant_method": method, **settings}


KINDS: dict[str, tuple[dict[str, Any], Quantizer]] = {
    **{f"gptq {bits}": (described("gptq", bits=bits, group_size=32), gptq(bits)) for bits in (2, 3, 4, 8)},
    "gptq in order of activation": (described("gptq", bits=4, desc_act=True), gptq(4, order=True)),
    "gptq symmetric": (described("gptq", bits=4, sym=True, checkpoint_format="gptq"), gptq(4, symmetric=True)),
    "gptq of one group": (described("gptq", bits=4, group_size=-1), gptq(4, size=96)),
    "gptq version 2": (described("gptq", bits=4, checkpoint_format="gptq_v2"), gptq(4, version=2)),
    "awq": (described("awq", bits=4, group_size=32, version="gemm", zero_point=True), awq),
    "fp8 of blocks": (described("fp8", weight_block_size=[40, 24]), float8((40, 24))),
    "fp8 of large blocks": (described("fp8", weight_block_size=[128, 128]), float8((128, 128))),
    "fp8 of rows": (described("compressed-tensors", format="float-quantized"), float8((1, 0), "weight_scale")),
    "fp8 of tensors": (described("fp8", activation_scheme="static"), float8(None, "weight_scale")),
}  # fmt: skip


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(LAYERS, tmp_path_factory.mktemp("floats"))


def quantize(floats: Path, folder: Path, kind: str, **settings: Any) -> tuple[Path, Tensors]:
    """A quantized copy of a checkpoint; and all its weights as they should be read."""
    said, pack = KINDS[kind]
    folder.mkdir()
    tensors = load_file(floats / "model.safetensors")
    expected = dict(tensors)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        parts, expected[key] = pack(key.removesuffix(".weight"), tensors.pop(key))
        tensors |= parts
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((floats / "config.json").read_text()) | {"quantization_config": {**said, **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_floats_that_codes_stand_for(
    kind: str, floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weights, "_STRIP", 1000)  # several strips
    checkpoint, expected = quantize(floats, tmp_path / "c", kind)
    opened = open_checkpoint(checkpoint, "text-generation")
    assert opened.weights.keys() == expected.keys()
    for name, weight in opened.weights.items():
        np.testing.assert_array_equal(weight.read(), expected[name].numpy())
        np.testing.assert_array_equal(np.concatenate(list(weight.strips())), expected[name].numpy())
        if weight.stored_shape[1:]:
            np.testing.assert_array_equal(weight.transposed((1, 0)).read(), expected[name].numpy().T)
    stored = bind(skeleton(opened), opened).stored
    for originals in (loaded(opened).state_dict(), offloaded(opened).state_dict()):
        assert originals.keys() == stored.keys()
    for name, tensor in loaded(opened).state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), stored[name].read())
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["gptq 4", *(pytest.param(k, marks=pytest.mark.breadth) for k in ("awq", "fp8 of blocks"))]
)
def test_engines_equal_the_original(kind: str, floats: Path, tmp_path: Path) -> None:
    checkpoint, _ = quantize(floats, tmp_path / "c", kind)
    result = optimize(checkpoint, tmp_path / "out", task="text-generation", pipeline="fold-constants", clock=all_equal)
    assert result.manifest.targets["onnxruntime"].comparison["generation.next token"]["greedy"] == 1
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    assert json.loads((tmp_path / "out" / "onnxruntime" / "config.json").read_text()) == config


def test_experts_are_put_together_of_codes(tmp_path: Path) -> None:
    """Mixtral's experts lie in the file one by one, and are one parameter in the module."""
    experts = Species("mixtral", "text-generation", {**LAYERS.config, "num_local_experts": 2, "num_experts_per_tok": 1})
    floats = build(experts, tmp_path / "floats")
    tensors = load_file(floats / "model.safetensors")
    pack = float8((32, 32))
    for key in [key for key in tensors if "experts." in key]:
        tensors |= pack(key.removesuffix(".weight"), tensors.pop(key))[0]
    save_file(tensors, floats / "model.safetensors")
    config = json.loads((floats / "config.json").read_text())
    config["quantization_config"] = described("fp8", weight_block_size=[32, 32])
    (floats / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(floats, "text-generation")
    stored = bind(skeleton(opened), opened).stored
    for name, tensor in loaded(opened).state_dict().items():
        np.testing.assert_array_equal(stored[name].read(), tensor.numpy())


METHODS: dict[str, tuple[object, str]] = {
    "bitsandbytes": (described("bitsandbytes", load_in_4bit=True), "(bitsandbytes), which is not read"),
    "bitsandbytes unnamed": ({"load_in_4bit": True}, "(bitsandbytes), which is not read"),
    "mxfp4": (described("mxfp4"), "(mxfp4), which is not read"),
    "compressed-tensors": (
        described("compressed-tensors", format="marlin-24"),
        "(compressed-tensors, marlin-24), which is not read",
    ),
    "modelopt": (described("modelopt", quant_algo="NVFP4"), "(modelopt, NVFP4), which is not read"),
    "unnamed": ({"bits": 4}, "(unknown), which is not read"),
    "no object": (5, "its quantization_config is no object"),
    "gptq of five bits": (described("gptq", bits=5), "quantized to 5 bits, which is not read"),
    "marlin": (described("gptq", bits=4, is_marlin_format=True), "packed for marlin, which is not read"),
    "awq of gemv": (described("awq", bits=4, version="gemv"), "by AWQ to 4 bits for gemv, which is not read"),
    "block of words": (described("fp8", weight_block_size=["x", 1]), "its weight_block_size is no pair"),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_are_refused_at_once(name: str, floats: Path, tmp_path: Path) -> None:
    said, message = METHODS[name]
    checkpoint, _ = quantize(floats, tmp_path / "c", "awq")
    config = json.loads((checkpoint / "config.json").read_text()) | {"quantization_config": said}
    (checkpoint / "config.json").write_text(json.dumps(config))
    begin = time.monotonic()
    with pytest.raises(BadInput) as caught:
        open_checkpoint(checkpoint, "text-generation")
    assert message in str(caught.value)
    assert name in ("no object", "block of words") or "give the float checkpoint" in str(caught.value)
    assert time.monotonic() - begin < 1


def test_what_is_said_of_a_part_counts_and_what_lies_beside(floats: Path, tmp_path: Path) -> None:
    checkpoint, _ = quantize(floats, tmp_path / "c", "gptq 4")
    config = json.loads((checkpoint / "config.json").read_text())
    said = config.pop("quantization_config")
    (checkpoint / "config.json").write_text(json.dumps({**config, "text_config": {"quantization_config": "x"}}))
    with pytest.raises(BadInput, match="no object"):
        open_checkpoint(checkpoint, "text-generation")
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"qweight' is packed, and config\.json does not say how"):
        open_checkpoint(checkpoint, "text-generation")
    del said["quant_method"]
    (checkpoint / "quantize_config.json").write_text(json.dumps(said))
    assert all(
        weight.dtype.name == "FLOAT" for weight in open_checkpoint(checkpoint, "text-generation").weights.values()
    )


def edited(checkpoint: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


LAYER = "model.layers.0.mlp.down_proj"
BROKEN: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scales": ("gptq 4", lambda t: t.pop(f"{LAYER}.scales"), "is quantized and has no scales"),
    "no zero points": ("awq", lambda t: t.pop(f"{LAYER}.qzeros"), "is quantized and has no qzeros"),
    "fewer groups": ("gptq 4", lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:1]}), "do not have the sh"),
    "groups beyond": ("gptq 4", lambda t: t[f"{LAYER}.g_idx"].add_(9), "do not have the shapes"),
    "groups below": ("gptq 4", lambda t: t[f"{LAYER}.g_idx"].sub_(9), "do not have the shapes"),
    "other bits": ("gptq 8", lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:5]}), "do not have the sh"),
    "flat codes": ("gptq 4", lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][0]}), "do not have the sh"),
    "floats as codes": (
        "awq",
        lambda t: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"].float()}),
        "do not have the",
    ),
    "scales of another block": (
        "fp8 of blocks",
        lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.ones(3, 5)}),
        "do not have the shapes",
    ),
    "codes without scales": (
        "fp8 of blocks",
        lambda t: t.pop(f"{LAYER}.weight_scale_inv"),
        f"'{LAYER}.weight' has elements of 8 bits (FLOAT8E4M3FN) and no scales",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_refused(name: str, floats: Path, tmp_path: Path) -> None:
    kind, change, message = BROKEN[name]
    checkpoint, _ = quantize(floats, tmp_path / "c", kind)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(edited(checkpoint, change), "text-generation")
    assert message in str(caught.value)


def test_integers_where_floats_should_be_are_refused(floats: Path, tmp_path: Path) -> None:
    checkpoint, _ = quantize(floats, tmp_path / "c", "fp8 of blocks")
    norm = "model.norm.weight"
    opened = open_checkpoint(edited(checkpoint, lambda t: t.update({norm: t[norm].to(torch.int8)})), "text-generation")
    with pytest.raises(BadInput, match=r"'model\.norm\.weight' holds INT8"):
        bind(skeleton(opened), opened)


def test_codes_of_layers_that_store_their_weight_turned_are_refused(tmp_path: Path) -> None:
    turned = build(Species("gpt2", "text-generation", {"n_embd": 32, "n_layer": 1, "n_head": 2}), tmp_path / "floats")
    tensors = load_file(turned / "model.safetensors")
    key = "transformer.h.0.attn.c_proj"
    tensors |= gptq(4)(key, tensors.pop(f"{key}.weight"))[0]
    save_file(tensors, turned / "model.safetensors")
    config = json.loads((turned / "config.json").read_text()) | {"quantization_config": described("gptq", bits=4)}
    (turned / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(turned, "text-generation")
    with pytest.raises(BadInput, match="stores its weight turned"):
        bind(skeleton(opened), opened)
