"""RoPE whose frequencies depend on the length: LongRoPE (Ding et al. 2024) and dynamic NTK scaling.

transformers changes the buffer `inv_freq` during calls: LongRoPE selects one of two sets; dynamic NTK computes a set
for each length that exceeds all earlier ones. In a fresh model the set is a function of the largest position of the
call. That function is traced, and the original is reset before each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

_DYNAMIC = "dynamic"
_LONG = "longrope"


def trace_frequencies(model: Any) -> None:
    """Make ``model`` compute the frequencies of a call from its largest position, with traceable operators."""
    for rotary in _rotary_modules(model):
        rotary.forward = partial(_forward, rotary, _undecorated(type(rotary).forward))


def forget_lengths(model: Any) -> None:
    """Reset ``model`` before every call: dynamic NTK keeps the frequencies of the longest earlier text."""
    for rotary in _rotary_modules(model):
        rotary.register_forward_pre_hook(_reset)


def notes(model: Any) -> tuple[str, ...]:
    """A note for the manifest on the keys in a cache when a text exceeds the length that changes frequencies."""
    kinds = {str(part.get("rope_type")) for part in parameters_of(model.config.get_text_config()).values()}
    return tuple(
        f"rope_type {kind!r}: frequencies follow the largest position of a call; keys that are cached keep those that "
        "they were made with, as in a call of the PyTorch model with its cache"
        for kind in sorted(kinds & {_DYNAMIC, _LONG} if model.can_generate() else ())
    )


def longest(config: Any) -> int | None:
    """Number of positions with dynamic NTK scaling; None for other kinds."""
    limits = [
        int(config.max_position_embeddings * settings.get("factor", 1.0))
        for settings in parameters_of(config).values()
        if settings.get("rope_type") == _DYNAMIC and isinstance(getattr(config, "max_position_embeddings", None), int)
    ]
    return max(limits, default=None)


def parameters_of(config: Any) -> Mapping[str | None, Mapping[str, Any]]:
    """The RoPE parameters of a configuration by layer type; key None if all layers share them."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = {kind: part for kind, part in given.items() if isinstance(part, dict)}
    return nested or {None: given}


def _rotary_modules(model: Any) -> Iterator[Any]:
    """Modules whose forward method has transformers' `dynamic_rope_update`, and frequencies to update."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if named & {_DYNAMIC, _LONG} and _undecorated(type(module).forward) is not None:
            yield module


def _undecorated(forward: Any) -> Any:
    """The method inside `dynamic_rope_update`, which may itself be decorated; None without that decorator."""
    while forward is not None:
        inner = getattr(forward, "__wrapped__", None)
        if forward.__globals__["__name__"] == "transformers.modeling_rope_utils":
            return inner
        forward = inner
    return None


def _forward(rotary: Any, forward: Any, x: Any, position_ids: Any, layer_type: str | None = None) -> Any:
    """The module's own forward method, with the frequencies of this call."""
    kind = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    kept = rotary._buffers[name]
    if kind in (_DYNAMIC, _LONG):
        rotary._buffers[name] = _frequencies(rotary, kind, position_ids, layer_type)
    try:
        return forward(rotary, x, position_ids, **({} if layer_type is None else {"layer_type": layer_type}))
    finally:
        rotary._buffers[name] = kept


def _frequencies(rotary: Any, kind: str, position_ids: Any, layer_type: str | None) -> Any:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = torch.max(position_ids) + 1
    compute = partial(ROPE_INIT_FUNCTIONS[kind], rotary.config, position_ids.device, layer_type=layer_type)
    short = getattr(rotary, "original_inv_freq" if layer_type is None else f"{layer_type}_original_inv_freq")
    if kind == _DYNAMIC:
        limit = rotary.original_max_seq_len
        stretched, _ = compute(seq_len=length)
    else:
        limit = parameters_of(rotary.config)[layer_type]["original_max_position_embeddings"]
        stretched, _ = compute(seq_len=limit + 1)
    return torch.where(length > limit, stretched, short)


def _reset(rotary: Any, _: Any) -> None:
    """Restore the initial frequencies of dynamic NTK scaling; LongRoPE selects a set in every call."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    for layer_type in (layer for layer, kind in kinds.items() if kind == _DYNAMIC):
        prefix = "" if layer_type is None else f"{layer_type}_"
        rotary._buffers[f"{prefix}inv_freq"] = getattr(rotary, f"{prefix}original_inv_freq")
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
