"""Checkpoints and adapters: tiny ones of several architectures with a few changes, through what reads and builds them.

Most cases end where a change is refused. Of those that are read, the weights that engines get must be those that
transformers loads; a share is lowered and built as a whole, and its engines must compute what PyTorch computes.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.torch import load_file, save_file

from planish.optimizer import optimize
from planish.optimizer.errors import CheckFailed
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.checkpoint.checkpoint import bind, loaded, open_checkpoint, skeleton
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from tests.clocks import all_faster
from tests.conftest import with_tokenizer
from tests.fuzz import Wrong
from tests.fuzz.harness import SECONDS
from tests.optimizer.lowering.test_adapter import adapter
from tests.optimizer.lowering.test_quantized_weights import KINDS
from tests.zoo import GENERATORS, IMAGES, ZOO, Species, build

_WHOLE_SHARE = 0.04
"""Of the cases that are built as a whole, which takes a hundred times as long."""
_TOLERANCE = 1e-6
_WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
_OVERFLOWS = 1e15
_MULTIPLE = 32
"""GPTQ and AWQ pack sizes that it divides."""


def _short(species: Species) -> Species:
    """The same with one layer."""
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    changed = {name: 1 for name in (*names, "num_decoder_layers") if name in species.config or name == names[0]}
    return Species(species.model_type, species.task, {**species.config, **changed})


def _named(table: list[Species], *names: str) -> list[Species]:
    return [_short(next(own for own in table if own.model_type == name)) for name in names]


SPECIES = [
    *_named(ZOO, "bert", "distilbert", "roberta", "albert", "modernbert", "deberta-v2"),
    *_named(GENERATORS, "gpt2", "llama", "qwen3", "gemma2", "mixtral", "t5", "bart"),
    *_named(IMAGES, "vit", "convnext"),
]
_ADAPTED = ("llama", "gpt2")
_PACKED = ("llama", "qwen3")

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 24, 400, 5000, 2**31, 2**63, 10**30, -(2**40), 0.5, -0.0, 1e-12, 1e300,
    float("nan"), float("inf"), "", "x", "0", "gelu", "relu", "auto", "float16", "cuda", "a/b:c", "\udc80", "é" * 99,
    [], [0], [1, 2], ["x"], [[[]]], {}, {"x": 1}, {"0": "a", "1": "b"}, {"rope_type": "yarn"},
]  # fmt: skip
KEYS = (
    "architectures", "model_type", "tie_word_embeddings", "dtype", "torch_dtype", "num_labels", "id2label", "label2id",
    "problem_type", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "use_cache",
    "attn_implementation", "is_decoder", "is_encoder_decoder", "pruned_heads", "sliding_window", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "text_config", "vision_config", "pad_token_id",
    "transformers_weights", "decoder_start_token_id", "hidden_act", "position_embedding_type", "add_cross_attention",
    "partial_rotary_factor", "num_hidden_layers", "vocab_size", "head_dim", "cross_attention_hidden_size", "suppress_tokens",
    "max_length", "num_beams", "eos_token_id", "forced_bos_token_id", "model_max_length", "tokenizer_class", "added_tokens",
)  # fmt: skip


def _lower_here(source: Any, *arguments: Any, background: bool, **options: Any) -> Any:
    """Lower with the original in this process: a process for each would take most of the time."""
    return lower(source, *arguments, **options)


def case(seed: int, folder: Path) -> str:
    """Make the checkpoint of this seed, read it, and compare."""
    rng = random.Random(seed)
    checkpoint, task, adapted = write(rng, folder)
    if rng.random() < _WHOLE_SHARE:
        try:
            with mock.patch("planish.optimizer.driver.optimize.lower", _lower_here):
                optimize(
                    checkpoint,
                    folder / "out",
                    task=task,
                    adapter=adapted,
                    pipeline="fold-constants",
                    clock=all_faster,
                )
        except CheckFailed as error:
            if not _finite(checkpoint):
                return "not finite, refused"
            raise Wrong(f"the engine is not the original: {error}") from error
        return "built, equal"
    start = time.process_time()
    opened = open_checkpoint(checkpoint, task, adapted)
    load_tokenizer(checkpoint)
    model = skeleton(opened, experts=None)
    binding = bind(model, opened)
    expected = loaded(opened).state_dict()
    for name, weight in binding.stored.items():
        if name in expected and weight.read().dtype.kind == "f":
            compare(name, weight.read(), expected[name].numpy())
    if time.process_time() - start > SECONDS:
        raise Wrong(f"reading took {time.process_time() - start:.0f} s")
    return "read, equal"


def _finite(checkpoint: Path) -> bool:
    """Whether a model may compute with its weights: the products of those that are larger overflow."""
    tensors = [tensor for path in checkpoint.glob("*.safetensors") for tensor in _readable(path).values()]
    return all(bool((tensor.float().abs() < _OVERFLOWS).all()) for tensor in tensors)


def compare(name: str, given: np.ndarray, wanted: np.ndarray) -> None:
    """Wrong if a weight is another than transformers loads."""
    if given.shape != wanted.shape:
        raise Wrong(f"{name} is {given.shape}, transformers loads {wanted.shape}")
    with np.errstate(all="ignore"):
        largest = np.abs(wanted[np.isfinite(wanted)], dtype=np.float64).max(initial=1.0)  # of what is summed
        same = np.isclose(given, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)
    if not same.all():
        raise Wrong(f"{name} differs at {int((~same).sum())} of {same.size} places from what transformers loads")


def write(rng: random.Random, folder: Path) -> tuple[Path, str | None, Path | None]:
    """The mutated checkpoint, the task to ask for, and perhaps an adapter."""
    number = rng.randrange(len(SPECIES))
    species, base = SPECIES[number], originals(number)
    checkpoint = Path(shutil.copytree(base / "plain", folder / "checkpoint"))
    adapted: Path | None = None
    if species.model_type in _ADAPTED and rng.random() < 0.4:
        adapted = Path(shutil.copytree(base / "adapter", folder / "adapter"))
    elif species.model_type in _PACKED and rng.random() < 0.4:
        _pack(rng, checkpoint)
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3))):
        place = adapted if adapted is not None and rng.random() < 0.8 else checkpoint
        rng.choice(MUTATIONS)(rng, place)
    return checkpoint, species.task if rng.random() < 0.8 else None, adapted


@functools.cache
def originals(number: int) -> Path:
    """The checkpoint of a species as it was saved, with a tokenizer, and an adapter for it."""
    species = SPECIES[number]
    folder = Path(tempfile.mkdtemp(prefix="originals-"))
    wide = {**species.config, **_WIDE} if species.model_type in _PACKED else species.config
    plain = build(Species(species.model_type, species.task, wide), folder / "plain")
    with_tokenizer(plain)
    if species.model_type in _ADAPTED:
        path = adapter(plain, "LoraConfig", {"target_modules": "all-linear"}, folder) / "adapter_config.json"
        _change(path, lambda settings: settings["target_modules"].sort())  # peft keeps them in a set
    return folder


def _pack(rng: random.Random, folder: Path) -> None:
    """Quantize the weights."""
    said, quantizer = KINDS[rng.choice(sorted(KINDS))]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith("_proj.weight") and tensors[key].ndim == 2]:
        if not any(size % _MULTIPLE for size in tensors[key].shape):
            tensors |= quantizer(key.removesuffix(".weight"), tensors.pop(key))[0]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    _change(folder / "config.json", lambda config: config.update(quantization_config=dict(said)))


def _change(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(json.dumps(value).encode("utf-8"))


def _json_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if path.read_bytes()[:1] == b"{" and _parses(path)]


def _parses(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):
        return False


def change_setting(rng: random.Random, folder: Path) -> None:
    """Another value for a key of a configuration, at any depth; or the key removed."""

    def change(value: Any) -> None:
        places: list[tuple[Any, Any]] = []
        parts = [value]
        while parts:
            part = parts.pop()
            keys = list(part) if isinstance(part, dict) else list(range(min(len(part), 20)))
            places += [(part, key) for key in keys]
            parts += [part[key] for key in keys if isinstance(part[key], dict | list)]
        if not places:
            return
        part, key = rng.choice(places)
        if rng.random() < 0.15:
            del part[key]
        elif rng.random() < 0.2:
            other, place = rng.choice(places)
            part[key] = json.loads(json.dumps(other[place]))
        elif rng.random() < 0.3 and isinstance(part[key], int):
            part[key] = part[key] + rng.choice((-1, 1, 2, 1 << 20))
        else:
            part[key] = rng.choice(ODD)

    files = _json_files(folder)
    if files:
        favourite = [path for path in files if path.name in ("config.json", "adapter_config.json")]
        _change(rng.choice(favourite if favourite and rng.random() < 0.7 else files), change)


def add_setting(rng: random.Random, folder: Path) -> None:
    """A key that some configurations have, with any value."""
    files = _json_files(folder)
    if files:
        key, value = rng.choice(KEYS), rng.choice(ODD)
        _change(rng.choice(files), lambda settings: settings.update({key: value}))


def change_header(rng: random.Random, folder: Path) -> None:
    """A header that lies."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return
    path = rng.choice(paths)
    if not _readable(path):
        return
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    how = rng.randrange(8)
    if how == 0:
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "I32", "F8_E4M3", "F8_E8M0", "BOOL", "X", 5))
    elif how == 1:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [], [0], [-1], [2.0], 5, [1 << 62] * 3)
        )
    elif how == 2:
        entry["data_offsets"] = [place + rng.choice((-4, 4, 0, 0.0, 1 << 40)) for place in entry["data_offsets"]]
    elif how == 3:
        header[rng.choice((f"{name}x", f"model.{name}", name.replace("0", "7"), "", "\ud800", "x" * 9999))] = (
            header.pop(name)
        )
    elif how == 4:
        other = rng.choice(sorted(set(header) - {"__metadata__"}))
        header[name], header[other] = header[other], header[name]
    elif how == 5:
        header["__metadata__"] = rng.choice(ODD)
    elif how == 6:
        header[name] = rng.choice(ODD)
    else:
        del entry[rng.choice(sorted(entry))]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def change_tensors(rng: random.Random, folder: Path) -> None:
    """Tensors that are dropped, turned, of another type or of odd values, in a file that is whole."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths or not (tensors := _readable(paths[0])):
        return
    import torch

    name = rng.choice(sorted(tensors))
    how = rng.randrange(5)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = tensors[name].t().contiguous() if tensors[name].ndim == 2 else tensors[name][:1].clone()
    elif how == 2:
        kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool)
        tensors[name] = tensors[name].to(rng.choice(kinds))
    elif how == 3 and tensors[name].is_floating_point():
        odd = torch.full(tensors[name].shape, rng.choice((0.0, float("nan"), float("inf"), 1e30)))
        tensors[name] = odd.to(tensors[name].dtype)  # 1e30 may be an infinity there
    else:
        tensors[f"{name}.{rng.choice(('scales', 'bias', 'weight_scale', 'extra'))}"] = torch.ones(3)
    save_file(tensors, paths[0])


def _readable(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError

    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, ValueError, OSError):
        return {}


def shard(rng: random.Random, folder: Path) -> None:
    """Two shards and their index, which may lie."""
    path = folder / "model.safetensors"
    if not path.is_file() or not (tensors := _readable(path)):
        return
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    if rng.random() < 0.9:
        path.unlink()
    table: dict[str, Any] = {name: file for file, part in files.items() for name in part}
    if rng.random() < 0.6 and table:
        table[rng.choice(names)] = rng.choice(("b.safetensors", "c.safetensors", "../a.safetensors", *ODD))
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": table}
    if rng.random() < 0.2:
        index[rng.choice(("metadata", "weight_map"))] = rng.choice(ODD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_bytes(rng: random.Random, folder: Path) -> None:
    """Bytes of any file changed, or its end cut off, or something else in its place."""
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    content = bytearray(path.read_bytes())
    how = rng.randrange(4)
    if how == 0 and content:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
    elif how == 1:
        del content[rng.randrange(len(content) + 1) :]
    elif how == 2:
        content = bytearray(rng.choice((b"", b"[" * 5000, b"5", b"null", b'"x"', b"[]", b"{}", b"\xff\xfe{\x00}\x00")))
    else:
        path.unlink()
        return
    path.write_bytes(content)


def write_generation(rng: random.Random, folder: Path) -> None:
    """Settings of generation of any kind."""
    keys = rng.sample(KEYS, 2)
    (folder / "generation_config.json").write_text(json.dumps({key: rng.choice(ODD) for key in keys}))


MUTATIONS: list[Callable[[random.Random, Path], None]] = [
    *[change_setting] * 6, *[add_setting] * 2, *[change_header] * 2, *[change_tensors] * 3, shard, *[damage_bytes] * 2,
    write_generation,
]  # fmt: skip
