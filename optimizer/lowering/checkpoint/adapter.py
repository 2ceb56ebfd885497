"""A PEFT adapter, merged lazily into its base weights: one tensor at a time, when it is read.

Supported: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024) and AdaLoRA (Zhang et al. 2023).
For a weight W of shape (out, in) with A of shape (rank, in) and B of shape (out, rank)::

    LoRA      W + s B A                          s = alpha / rank, rsLoRA: alpha / sqrt(rank)
    AdaLoRA   W + alpha / rank B (A * E)
    DoRA      m * (W + s B A) / |W + s B A|      m: one magnitude a row, | |: norm of each row
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput, OutOfResources
from planish.optimizer.lowering.checkpoint.failures import told_as_bad_input
from planish.optimizer.lowering.checkpoint.weights import Stored, Weight, read_header
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.links import file_in

FILES = ("adapter_config.json", "adapter_model.safetensors")
_KINDS = ("LORA", "ADALORA")
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_E|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)(\.weight)?")
_OFF = (None, False)
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "target_parameters": (None, []),
    **dict.fromkeys(
        (
            "lora_bias", "megatron_config", "corda_config", "eva_config", "lora_ga_config", "trainable_token_indices",
            "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
            "monteclora_config", "velora_config",
        ),
        _OFF,
    ),
}  # fmt: skip
"""Options that change more than weights, or the base before the merge, with the values at which they do not (other
initializations decompose the base)."""
_PLAIN = re.compile(r"[\w.\-\\^$]*")
"""Patterns without repetition or choice, which match in linear time."""
_PATIENCE = 10.0
"""Time limit in seconds for matching all patterns of an adapter; a hundred patterns take milliseconds."""
_MERGE = "merge it with peft and give the merged checkpoint"
_DEFAULT_ALPHA = 8
_LARGEST = 1e6
"""Upper bound of ranks and alphas."""
_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    hits = [[bool(re.match(pattern, name)) for name in names] for pattern in patterns]
except Exception as error:
    hits = f"{type(error).__name__}: {error}"
json.dump(hits, sys.stdout)
"""
"""Program of the matching process: a regular expression may run forever, and only a kill stops it."""


@dataclass(frozen=True)
class Delta:
    """The change of one weight by an adapter."""

    parts: Mapping[str, Stored]
    scale: float
    turned: bool
    """True if the weight is stored as (in, out)."""

    def added_to(self, weight: np.ndarray) -> np.ndarray:
        """The merged weight in float32, with the shape of the base."""
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


@dataclass(frozen=True)
class Merged(Weight):
    """A weight merged with an adapter when it is read."""

    base: Weight
    delta: Delta

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape

    def read(self) -> np.ndarray:
        """The merged weight with permuted axes."""
        return np.ascontiguousarray(self.delta.added_to(self.base.read()).transpose(self.order))


def merge_adapter(bound: Mapping[str, Weight], folder: Path, model: Any) -> dict[str, Weight]:
    """Weights by parameter name with the adapter in ``folder`` merged into them.

    BadInput if the adapter is of an unsupported kind, of another base (a name or a shape differs), or invalid.
    """
    config = read_adapter(folder)
    hits = _check_patterns(config, [name for name, _ in model.named_modules()], folder)
    parts, replaced = _parts(folder)
    _check_targets(config, parts, folder)
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
    for module, tensors in parts.items():
        name = f"{module}.weight"
        base = merged.get(name)
        if base is None:
            raise BadInput(
                f"the adapter changes {module!r}, which {type(model).__name__} does not have",
                where=folder,
                advice="give the adapter that was trained for this base",
            )
        _check_fit(base, tensors, name, folder, turned := _is_turned(model, module))
        alpha = hits.get(module, config.get("lora_alpha", _DEFAULT_ALPHA))
        # Merged lazily: W + sBA is computed when the weight is read, not here.
        delta = Delta(tensors, _scale(config, alpha, tensors), turned)
        merged[name] = Merged(base, delta)
        if name in ties:  # peft changes the one tensor that both are
            merged[ties[name]] = merged[name]
    return merged


def read_adapter(folder: Path) -> dict[str, Any]:
    """The checked configuration of an adapter; BadInput for missing or unsupported settings."""
    for name in FILES:
        if file_in(folder, name) is None:
            advice = "save the adapter with safe_serialization=True" if name.endswith("safetensors") else None
            raise BadInput(f"there is no {name}", where=folder, advice=advice)
    config = read_object(folder / FILES[0])
    kind = config.get("peft_type")
    if kind is None:
        raise BadInput("this is not the configuration of an adapter: it names no peft_type", where=folder / FILES[0])
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
                advice=_MERGE,
            )
    _check_numbers(config, folder / FILES[0])
    return config


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Raise BadInput if a rank or an alpha is no finite positive number."""
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, table in patterns.items():
        if not isinstance(table, dict):
            raise BadInput(f"its {key} is no table of numbers but {table!r}", where=path)
    ranks = [config.get("r", 1), *(patterns["rank_pattern"].values() if config["peft_type"] == "LORA" else ())]
    alphas = [config.get("lora_alpha", _DEFAULT_ALPHA), *patterns["alpha_pattern"].values()]
    for rank in ranks:
        if type(rank) is not int or not 0 < rank <= _LARGEST:
            raise BadInput(f"a rank in it is not a positive number but {rank!r}", where=path)
    for alpha in alphas:
        if type(alpha) not in (int, float) or not -_LARGEST <= alpha <= _LARGEST:
            raise BadInput(f"an alpha in it is not a number but {alpha!r}", where=path)


def _check_patterns(config: Mapping[str, Any], modules: Sequence[str], folder: Path) -> dict[str, Any]:
    """The alpha of each module in `alpha_pattern`, as peft reads it.

    BadInput if a pattern of the configuration is no regular expression, or exceeds the time limit on the names of these
    modules: peft matches all of them without a limit.
    """
    alphas = config.get("alpha_pattern") or {}
    endings = {key: rf"(.*\.)?({key})$" for key in (*alphas, *(config.get("rank_pattern") or ()))}
    others = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    layers = _texts(config.get("layers_pattern"), folder)
    others += [rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\." for text in layers]
    others += [rf"(^|.*\.){text}($|\..*)" for text in _texts(config.get("modules_to_save"), folder)]
    plain = all(_PLAIN.fullmatch(text) for text in (*endings, *layers, *others))
    table = _matches([*endings.values(), *others], modules, folder / FILES[0], here=plain)
    first_pattern: dict[str, Any] = {}
    for key, hits in zip(alphas, table, strict=False):  # those of alpha_pattern come first
        for module in (name for name, hit in zip(modules, hits, strict=True) if hit):
            first_pattern.setdefault(module, alphas[key])
    return first_pattern


def _check_targets(config: Mapping[str, Any], modules: Iterable[str], folder: Path) -> None:
    """Raise BadInput if the adapter changes a module that its configuration does not target: peft ignores it
    silently."""
    target = config.get("target_modules")
    if target is None or str(target).lower() == "all-linear":
        return
    with told_as_bad_input("peft cannot read the adapter", folder):
        from peft import PeftConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        settings = PeftConfig.from_pretrained(str(folder), local_files_only=True)
        left = [module for module in modules if not check_target_module_exists(settings, module)]
    if left:
        raise BadInput(
            f"it has weights for {left[0]!r}, which its target_modules do not name",
            where=folder / FILES[0],
            advice="configuration and weights are of different adapters",
        )


def _texts(value: object, folder: Path) -> list[str]:
    """A configuration entry that is one text or a list of texts."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"a name of modules in it is no text but {value!r}", where=folder / FILES[0])
    return texts


def _matches(patterns: Sequence[str], names: Sequence[str], path: Path, *, here: bool) -> list[list[bool]]:
    """The names that each pattern matches at their start; in a separate process unless ``here``."""
    if here:
        with told_as_bad_input("a pattern in it is no regular expression", path):
            return [[re.match(pattern, name) is not None for name in names] for pattern in patterns]
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    text = json.dumps([patterns, names])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"its patterns take longer than {_PATIENCE:g} s to match the names of modules",
            where=path,
            advice="write them without repetitions inside repetitions",
        ) from None
    except subprocess.CalledProcessError as error:
        raise OutOfResources(
            f"the process that matches its patterns ended with code {error.returncode}", where=path, advice="run again"
        ) from error
    hits = json.loads(done.stdout)
    if isinstance(hits, str):
        raise BadInput(f"a pattern in it is no regular expression ({hits})", where=path)
    return list(hits)


def _parts(folder: Path) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Tensors of the adapter by module and kind; and tensors that replace a weight."""
    parts: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for key, tensor in read_header(folder / FILES[1]).items():
        name = key.removeprefix(_PREFIX)
        match = _PART.fullmatch(name)
        if match is None:
            replaced[name.replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    return parts, replaced


def _scale(config: Mapping[str, Any], alpha: float, parts: Mapping[str, Stored]) -> float:
    """The factor of B A: alpha divided by the rank of the tensors (by its square root for rsLoRA)."""
    rank = parts["lora_A" if "lora_A" in parts else "lora_embedding_A"].stored_shape[0]
    if config["peft_type"] == "ADALORA":
        return (alpha if alpha > 0 else float(rank)) / (rank + 1e-5)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_turned(model: Any, module: str) -> bool:
    """True if a layer stores its weight as (in, out), as the Conv1D of transformers does."""
    return type(model.get_submodule(module)).__name__ == "Conv1D"


def _check_fit(base: Weight, parts: Mapping[str, Stored], name: str, folder: Path, turned: bool) -> None:
    """Raise BadInput unless the tensors have one common rank and the base's shape."""
    shapes = {kind: part.stored_shape for kind, part in parts.items()}
    embedding = {"lora_embedding_A", "lora_embedding_B"} <= shapes.keys()
    first, second = (f"lora_embedding_{side}" if embedding else f"lora_{side}" for side in "AB")
    ranked = [shapes.get(first, ()), shapes.get(second, ())]
    if any(len(shape) != 2 for shape in ranked) or not ranked[0][0]:
        raise BadInput(f"the adapter's part for {name!r} is incomplete, or not of a linear layer", where=folder)
    rank, shape = ranked[0][0], (ranked[1][0], ranked[0][1])
    base_shape = base.stored_shape[::-1] if turned or embedding else base.stored_shape
    if base_shape != shape or ranked[1][1] != rank:
        raise BadInput(
            f"the adapter's part for {name!r} has shape {list(shape)}, the base has {list(base_shape)}",
            where=folder,
            advice="give the adapter that was trained for this base",
        )
    if embedding and "lora_magnitude_vector" in shapes:
        raise BadInput(f"DoRA of the embedding {name!r} is not supported", where=folder, advice=_MERGE)
    vectors = {"lora_E": (rank, 1), "lora_magnitude_vector": (shape[0],)}
    wrong = [kind for kind, vector in vectors.items() if shapes.get(kind, vector) != vector]
    if wrong:
        raise BadInput(f"{wrong[0]} of the adapter for {name!r} has another shape than its layer", where=folder)


def merged_original(module: Any, folder: Path) -> Any:
    """The model with the adapter merged by peft itself: the original for comparison."""
    from peft import PeftModel

    _check_patterns(read_adapter(folder), [name for name, _ in module.named_modules()], folder)
    with told_as_bad_input("peft cannot merge the adapter", folder):
        return PeftModel.from_pretrained(module, folder, local_files_only=True).merge_and_unload().eval()
