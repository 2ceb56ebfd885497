"""A PEFT adapter, merged into the weights it was trained for: lazily, one tensor when it is read.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024) and AdaLoRA (Zhang et al. 2023) are known.
For a weight W of shape (out, in) with A of shape (rank, in) and B of shape (out, rank)::

    LoRA      W + s B A                          s = alpha / rank, rsLoRA: alpha / sqrt(rank)
    AdaLoRA   W + alpha / rank B (A * E)
    DoRA      m * (W + s B A) / |W + s B A|      m: one magnitude a row, | |: norm of each row
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.weights import Stored, read_header

FILES = ("adapter_config.json", "adapter_model.safetensors")
_KINDS = ("LORA", "ADALORA")
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_E|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)(\.weight)?")
_REFUSED = {"bias": ("none",), "lora_bias": (False, None), "megatron_config": (None,), "corda_config": (None,)}
"""Options that change more than weights, and the values at which they do not."""


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight."""

    parts: Mapping[str, Stored]
    scale: float
    turned: bool
    """The weight is stored as (in, out)."""

    def added_to(self, weight: np.ndarray) -> np.ndarray:
        """The merged weight, float32, shape as given."""
        parts = {name: stored.widened().read() for name, stored in self.parts.items()}
        if "lora_embedding_A" in parts:
            return np.asarray(weight + self.scale * (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T)
        first = parts["lora_A"] * parts["lora_E"] if "lora_E" in parts else parts["lora_A"]
        delta = parts["lora_B"] @ first * np.float32(self.scale)
        merged = weight + (delta.T if self.turned else delta)
        if "lora_magnitude_vector" not in parts:
            return np.asarray(merged, np.float32)
        axis = 0 if self.turned else 1
        factor = parts["lora_magnitude_vector"] / np.linalg.norm(merged, axis=axis)
        return np.asarray(merged * np.expand_dims(factor, axis), np.float32)


@dataclass(frozen=True, kw_only=True)
class Merged(Stored):
    """A stored weight with an adapter's part added as it is read."""

    base: Stored
    delta: Delta

    def read(self) -> np.ndarray:
        """The merged weight, in the order of its permutation."""
        merged = self.delta.added_to(self.base.widened().read())
        return merged if self.permutation is None else np.ascontiguousarray(merged.transpose(self.permutation))

    def read_into(self, found: np.ndarray) -> None:
        """Write it into an array of its shape."""
        found[...] = self.read()


def merge_adapter(bound: Mapping[str, Stored], folder: Path, model: Any) -> dict[str, Stored]:
    """Weights by parameter name with the adapter in ``folder`` merged into them.

    BadInput if the adapter is of an unsupported kind, was trained for another base (a name or a shape differs), or is
    not data.
    """
    config = read_adapter(folder)
    parts, replaced = _parts(folder)
    merged = dict(bound)
    ties = {name: other for pair in model.all_tied_weights_keys.items() for name, other in (pair, pair[::-1])}
    for name, tensor in replaced.items():
        if name not in bound or bound[name].stored_shape != tensor.stored_shape or name in ties:
            why = "is tied to another weight" if name in ties else "the base does not have in that shape"
            raise BadInput(
                f"the adapter replaces {name!r}, which {why}",
                where=folder,
                advice="give the adapter that was trained for this base, or merge it with peft",
            )
        merged[name] = tensor.widened()
    for module, found in parts.items():
        name = f"{module}.weight"
        base = merged.get(name)
        if base is None:
            raise BadInput(
                f"the adapter changes {module!r}, which {type(model).__name__} does not have",
                where=folder,
                advice="give the adapter that was trained for this base",
            )
        delta = Delta(found, _scale(config, module, found), _is_turned(model, module))
        _check_fit(base, delta, name, folder)
        merged[name] = Merged(
            base.path, base.offset, base.stored, base.stored_shape, ir.DataType.FLOAT, base=base, delta=delta
        )
        if name in ties:  # peft changes the one tensor that both are
            merged[ties[name]] = merged[name]
    return merged


def read_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter, checked; BadInput says what is missing or not supported."""
    for name in FILES:
        if not (folder / name).is_file():
            advice = "save the adapter with safe_serialization=True" if name.endswith("safetensors") else None
            raise BadInput(f"there is no {name}", where=folder, advice=advice)
    try:
        config: dict[str, Any] = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"this is not the configuration of an adapter ({error})", where=folder / FILES[0]) from error
    if kind not in _KINDS:
        raise BadInput(
            f"adapters of type {kind} are not supported",
            where=folder / FILES[0],
            advice=f"there are: {', '.join(_KINDS)}; or merge it with peft and give the merged checkpoint",
        )
    for option, harmless in _REFUSED.items():
        if config.get(option, harmless[0]) not in harmless:
            raise BadInput(
                f"an adapter with {option}={config[option]!r} is not supported",
                where=folder / FILES[0],
                advice="merge it with peft and give the merged checkpoint",
            )
    return config


def _parts(folder: Path) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Tensors of the adapter by the module they change and their kind; and those that replace a weight."""
    found: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for key, tensor in read_header(folder / FILES[1]).items():
        name = key.removeprefix(_PREFIX)
        match = _PART.fullmatch(name)
        if match is None:
            replaced[name.replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    return found, replaced


def _scale(config: Mapping[str, Any], module: str, parts: Mapping[str, Stored]) -> float:
    """The factor of B A: alpha over the rank that the tensors have (over its square root for rsLoRA)."""
    first = parts.get("lora_A", parts.get("lora_embedding_A"))
    rank = first.stored_shape[0] if first is not None else int(config["r"])
    alpha = float(_matching(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    if config["peft_type"] == "ADALORA":
        return (alpha if alpha > 0 else float(rank)) / (rank + 1e-5)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The entry whose key matches the end of a module's path, as peft reads it."""
    hit = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    return default if hit is None else patterns[hit]


def _is_turned(model: Any, module: str) -> bool:
    """Whether a layer stores its weight as (in, out), as the Conv1D of transformers does."""
    return type(model.get_submodule(module)).__name__ == "Conv1D"


def _check_fit(base: Stored, delta: Delta, name: str, folder: Path) -> None:
    parts = delta.parts
    if {"lora_embedding_A", "lora_embedding_B"} <= parts.keys():
        shape = (parts["lora_embedding_A"].stored_shape[1], parts["lora_embedding_B"].stored_shape[0])
    elif {"lora_A", "lora_B"} <= parts.keys() and len(parts["lora_A"].stored_shape) == 2:
        shape = (parts["lora_B"].stored_shape[0], parts["lora_A"].stored_shape[1])
    else:
        raise BadInput(f"the adapter's part for {name!r} is incomplete, or not of a linear layer", where=folder)
    if base.stored_shape != (shape[::-1] if delta.turned else shape):
        raise BadInput(
            f"the adapter's part for {name!r} has shape {list(shape)}, the base has {list(base.stored_shape)}",
            where=folder,
            advice="give the adapter that was trained for this base",
        )


def merged_original(module: Any, folder: Path) -> Any:
    """The model as peft itself merges the adapter: the original that engines must match."""
    from peft import PeftModel

    return PeftModel.from_pretrained(module, folder, local_files_only=True).merge_and_unload().eval()
