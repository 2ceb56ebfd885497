"""Parameters that transformers puts together from several stored tensors: the same bits, never whole in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planish.optimizer.lowering.checkpoint import weights
from planish.optimizer.lowering.checkpoint.checkpoint import bind, loaded, open_checkpoint, skeleton
from planish.optimizer.lowering.checkpoint.converted_weights import Converted
from planish.optimizer.lowering.checkpoint.merged_weights import Assembled, Assembly
from planish.optimizer.lowering.checkpoint.weights import Weight, boxes, read_header
from tests.zoo import Species, build

_COMMON = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "bos_token_id": 1,
           "eos_token_id": 2, "pad_token_id": 0, "num_hidden_layers": 2}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 12},
    "qwen2_moe": {"num_experts": 12, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 12},
    "phimoe": {"num_local_experts": 12},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", EXPERTS)
def test_merged_experts_are_those_of_the_loaded_model(model_type: str, dtype: str, tmp_path: Path) -> None:
    species = Species(model_type, "text-generation", {**_COMMON, **EXPERTS[model_type]})
    checkpoint = open_checkpoint(build(species, tmp_path / "checkpoint", dtype=dtype))
    model = skeleton(checkpoint)
    binding = bind(model, checkpoint)
    state = loaded(checkpoint).state_dict()
    assembled = {name for name, weight in binding.stored.items() if isinstance(weight, Assembled)}
    assert len(assembled) == 4
    assert {name for name, _ in model.named_parameters()} <= binding.stored.keys()
    for name, weight in binding.stored.items():
        assert weight.dtype.numpy() == np.float32
        np.testing.assert_array_equal(weight.read(), state[name].numpy())
        np.testing.assert_array_equal(_put_together(weight), state[name].numpy())
    for name in assembled:
        turned = binding.stored[name].transposed((0, 2, 1))
        np.testing.assert_array_equal(turned.read(), state[name].numpy().transpose(0, 2, 1))
        np.testing.assert_array_equal(_put_together(turned), turned.read())


def _put_together(weight: Weight) -> np.ndarray:
    flat = np.concatenate([strip.reshape(-1) for strip in weight.strips()])
    return flat.reshape(weight.shape)


def test_a_checkpoint_without_an_expert_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from planish.optimizer.errors import BadInput

    folder = build(Species("mixtral", "text-generation", {**_COMMON, **EXPERTS["mixtral"]}), tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if ".experts.11." in name]
    assert lost
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(BadInput, match=r"gate_up_proj' has shape \[11, .* describes \[12, "):
        bind(skeleton(checkpoint), checkpoint)


def _tensors(folder: Path, shape: tuple[int, ...], count: int) -> dict[str, np.ndarray]:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {f"experts.{i}.w": rng.standard_normal(shape).astype(np.float16) for i in range(count)}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _assembled(folder: Path, operations: list[Any], targets: list[str]) -> dict[str, Weight]:
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    rule = WeightConverter(["experts.*.w"], targets, operations=operations)
    assembly = Assembly([rule], torch.nn.Linear(1, 1, device="meta"))
    assembly.model.config = None
    header = read_header(folder / "model.safetensors")
    for key in sorted(header, key=dot_natural_key):
        assembly.add(targets[0], key, "experts.*.w", header[key].widened())
    return assembly.finish()


def test_operations_are_followed_whatever_they_are_called(tmp_path: Path) -> None:
    """Stacked along another axis, turned, and cut apart again: what torch makes of the tensors themselves."""
    from transformers.core_model_loading import Chunk, MergeModulelist, Transpose

    tensors = _tensors(tmp_path, (6, 10), 3)

    merge, turn = MergeModulelist(dim=1), Transpose(0, 2)
    merge.get_target_pattern = turn.get_target_pattern = lambda *_: "experts.*.w"  # neither is the last of the chain
    made = _assembled(tmp_path, [merge, turn, Chunk(dim=0)], ["a", "b", "c"])
    stacked = torch.stack([torch.from_numpy(array).float() for array in tensors.values()], 1).transpose(0, 2)
    for name, chunk in zip("abc", torch.chunk(stacked, 3, dim=0), strict=True):
        np.testing.assert_array_equal(made[name].read(), chunk.numpy())
        np.testing.assert_array_equal(_put_together(made[name]), chunk.numpy())


def test_what_cannot_be_followed_is_computed_when_it_is_read(tmp_path: Path) -> None:
    """Arithmetic, and an operation that looks at values: both are applied to the tensors themselves."""
    from transformers.core_model_loading import Interleave

    class Scaled:
        def convert(self, input_dict: Any, *_: Any, target_patterns: list[str], **__: Any) -> Any:
            return {target_patterns[0]: input_dict["experts.*.w"][0] * 2}

    tensors = _tensors(tmp_path, (6, 10), 1)
    array = tensors["experts.0.w"].astype(np.float32)
    wanted = {Scaled: array * 2, Interleave: array.reshape(3, 2, 10).transpose(1, 0, 2).reshape(6, 10)}
    for operation in (Interleave(dim=0), Scaled()):
        weight = _assembled(tmp_path, [operation], ["merged"])["merged"]
        assert isinstance(weight, Converted)
        np.testing.assert_array_equal(weight.read(), wanted[type(operation)])
        np.testing.assert_array_equal(weight.transposed((1, 0)).read(), wanted[type(operation)].T)


@pytest.mark.slow
def test_a_merged_parameter_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import MergeModulelist

    tensors = _tensors(tmp_path, (200, 100), 40)
    monkeypatch.setattr(weights, "_STRIP", 1000)
    weight = _assembled(tmp_path, [MergeModulelist(dim=0)], ["merged"])["merged"]
    tensor = weight.transposed((0, 2, 1)).tensor("merged")
    assert tensor.nbytes == 40 * 200 * 100 * 4
    with (tmp_path / "written").open("wb") as file:
        tracemalloc.start()
        tensor.tofile(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < tensor.nbytes / 20
    written = np.fromfile(tmp_path / "written", np.float32).reshape(40, 100, 200)
    np.testing.assert_array_equal(written, np.stack(list(tensors.values())).transpose(0, 2, 1))


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 3), (2, 4, 9), (3, 1, 50)])
@pytest.mark.parametrize("limit", [1, 6, 20, 1000])
def test_boxes_tile_an_array_in_the_order_of_its_memory(shape: tuple[int, ...], limit: int) -> None:
    array = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
    parts = [array[box].reshape(-1) for box in boxes(shape, limit)]
    np.testing.assert_array_equal(np.concatenate(parts), array.reshape(-1))
    assert max(part.size for part in parts) <= max(limit, 1)
