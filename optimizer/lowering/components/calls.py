"""Calls of modules by components: flat tensors by name in and out.

A call has a name, so that the process of the original can be told which one to make. Tensor names are those of the
ecosystem's loaders: input `past_key_values.0.key`, output `present.0.key`, and for encoder-decoders
`past_key_values.0.decoder.key` and `past_key_values.0.encoder.key`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tensors = Mapping[str, Any]
Call = Callable[[Any, Tensors], dict[str, Any]]

_CACHED = re.compile(r"past_key_values\.(\d+)\.(.+)")


def plain(module: Any, feeds: Tensors) -> dict[str, Any]:
    """One call without a cache; results by name."""
    return flatten(module(**feeds, **accepted(module, return_dict=True, use_cache=False)))


def module(module: Any, feeds: Tensors) -> dict[str, Any]:
    """One call of a module that is not from transformers."""
    return flatten(module(**feeds))


def decoder(module: Any, feeds: Tensors, **options: Any) -> dict[str, Any]:
    """New tokens after those in the cache (which may be empty): scores, and the extended cache."""
    given, past = _apart(feeds)
    cache = _cache(past) if past else None
    result = module(**given, **options, past_key_values=cache, use_cache=True, return_dict=True)
    cache = cache if cache is not None else result.past_key_values
    return {"logits": result.logits} | _presents(cache, "")


def last_decoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The same with the scores after the last token only, shape (batch, 1, vocabulary), as generation requires."""
    return decoder(module, feeds, logits_to_keep=1)


def encoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The encoder of an encoder-decoder."""
    return {"last_hidden_state": module.get_encoder()(**feeds, return_dict=True).last_hidden_state}


def first_decoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The decoder's first step: without a cache; it computes keys and values of the encoder's states."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return _decode(module, feeds, feeds["encoder_hidden_states"], cache, own_only=False)


def next_decoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The decoder's further steps: keys and values of the encoder's states come from the cache."""
    from transformers import EncoderDecoderCache

    given, past = _apart(feeds)
    self_attention, cross_attention = (
        {key: past[key] for key in past if key[1].startswith(side)} for side in ("decoder", "encoder")
    )
    cache = EncoderDecoderCache(_cache(self_attention), _cache(cross_attention))
    states = next(iter(cross_attention.values()))[:, 0, :, :1]  # only its length is asked for
    return _decode(module, given, states, cache, own_only=True)


def _decode(module: Any, feeds: Tensors, states: Any, cache: Any, *, own_only: bool) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutput

    # Speech encoders have states of static length and no mask.
    masks = {"attention_mask": feeds["encoder_attention_mask"]} if "encoder_attention_mask" in feeds else {}
    result = module(
        **masks,
        decoder_input_ids=feeds["input_ids"],
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    presents = _presents(cache.self_attention_cache, ".decoder")
    # Keys of the encoder's states do not change in further steps: they are no outputs there.
    crossed = {} if own_only else _presents(cache.cross_attention_cache, ".encoder")
    return {"logits": result.logits} | dict(sorted((presents | crossed).items(), key=_place))


def _place(item: tuple[str, Any]) -> tuple[int, str]:
    """Sort key of cache tensors: layer, then decoder before encoder, key before value."""
    _, layer, rest = item[0].split(".", 2)
    return int(layer), rest


CALLS: Mapping[str, Call] = {
    call.__name__: call for call in (plain, module, decoder, last_decoder, encoder, first_decoder, next_decoder)
}
"""Every way to call a module, by name."""


def flatten(result: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """The tensors of a module's result by name: the requested ones, or all in order.

    A mapping (as transformers returns) keeps its keys; a tensor or sequence is called `output` or `output_0`, ….
    """
    if isinstance(result, Mapping):
        tensors = {key: value for key, value in result.items() if hasattr(value, "shape")}
    elif isinstance(result, tuple | list):
        tensors = {f"output_{i}": value for i, value in enumerate(result) if hasattr(value, "shape")}
    else:
        tensors = {"output": result}
    return {name: tensors[name] for name in names} if names else tensors


def required_parameters(module: Any) -> set[str]:
    """Required arguments of the module's forward method."""
    return {
        name
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def accepted(module: Any, **wanted: Any) -> dict[str, Any]:
    """Those of the arguments that the module's forward method has."""
    parameters = inspect.signature(type(module).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {
        name: value for name, value in wanted.items() if name in parameters or (name == "return_dict" and takes_any)
    }


def _apart(feeds: Tensors) -> tuple[dict[str, Any], dict[tuple[int, str], Any]]:
    """Inputs without the cache, and cache inputs by layer and kind."""
    matches = {name: _CACHED.fullmatch(name) for name in feeds}
    given = {name: value for name, value in feeds.items() if matches[name] is None}
    return given, {(int(m[1]), m[2]): feeds[name] for name, m in matches.items() if m is not None}


def _cache(past: Mapping[tuple[int, str], Any]) -> Any:
    """A cache with these keys and values. Layers with a sliding window keep all tokens; their masks hide old ones."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for index in sorted({layer for layer, _ in past}):
        layer = DynamicLayer()
        layer.keys, layer.values = (
            next(past[key] for key in past if key[0] == index and key[1].endswith(kind)) for kind in ("key", "value")
        )
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
    return cache


def _presents(cache: Any, side: str) -> dict[str, Any]:
    """Keys and values of every layer."""
    return {
        f"present.{index}{side}.{kind}": tensor
        for index, layer in enumerate(cache.layers)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
    }
