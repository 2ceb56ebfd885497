"""How a component calls its module: flat tensors by name in, flat tensors by name out.

A call is known by a name, so that another process, which runs the original, can be told which one to make. The names
of tensors are those that the ecosystem's loaders read: `past_key_values.0.key` goes in, `present.0.key` comes out, and
an encoder-decoder tells `past_key_values.0.decoder.key` from `past_key_values.0.encoder.key`.
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
    """One call of a module that is not of transformers."""
    return flatten(module(**feeds))


def decoder(module: Any, feeds: Tensors, **options: Any) -> dict[str, Any]:
    """New tokens behind those in the cache (which may be empty): scores, and the cache with both."""
    given, past = _apart(feeds)
    cache = _cache(past) if past else None
    result = module(**given, **options, past_key_values=cache, use_cache=True, return_dict=True)
    cache = cache if cache is not None else result.past_key_values
    return {"logits": result.logits} | _presents(cache, "")


def last_decoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The same with the scores behind the last token alone, shape (batch, 1, vocabulary): what writing needs."""
    return decoder(module, feeds, logits_to_keep=1)


def encoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The encoder of an encoder-decoder."""
    return {"last_hidden_state": module.get_encoder()(**feeds, return_dict=True).last_hidden_state}


def first_decoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The decoder's first tokens: nothing is cached yet, so keys and values of the encoder's states are made."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return _decode(module, feeds, feeds["encoder_hidden_states"], cache, own_only=False)


def next_decoder(module: Any, feeds: Tensors) -> dict[str, Any]:
    """The decoder's further tokens: keys and values of the encoder's states are read from the cache."""
    from transformers import EncoderDecoderCache

    given, past = _apart(feeds)
    own, cross = ({key: past[key] for key in past if key[1].startswith(side)} for side in ("decoder", "encoder"))
    cache = EncoderDecoderCache(_cache(own), _cache(cross))
    states = next(iter(cross.values()))[:, 0, :, :1]  # only its length is asked for
    return _decode(module, given, states, cache, own_only=True)


def _decode(module: Any, feeds: Tensors, states: Any, cache: Any, *, own_only: bool) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutput

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
    crossed = {} if own_only else _presents(cache.cross_attention_cache, ".encoder")
    return {"logits": result.logits} | dict(sorted((presents | crossed).items(), key=_place))


def _place(item: tuple[str, Any]) -> tuple[int, str]:
    """By layer, then decoder before encoder, key before value."""
    _, layer, rest = item[0].split(".", 2)
    return int(layer), rest


CALLS: Mapping[str, Call] = {
    call.__name__: call for call in (plain, module, decoder, last_decoder, encoder, first_decoder, next_decoder)
}
"""Every way to call a module, by name."""


def flatten(result: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """The tensors of a module's result by name: those asked for, or all of them in order.

    A mapping (as transformers returns) keeps its keys; a tensor or sequence is called `output` or `output_0`, ….
    """
    if isinstance(result, Mapping):
        found = {key: value for key, value in result.items() if hasattr(value, "shape")}
    elif isinstance(result, tuple | list):
        found = {f"output_{i}": value for i, value in enumerate(result) if hasattr(value, "shape")}
    else:
        found = {"output": result}
    return {name: found[name] for name in names} if names else found


def required_parameters(module: Any) -> set[str]:
    """Arguments that the module's forward method cannot do without."""
    return {
        name
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def accepted(module: Any, **wanted: Any) -> dict[str, Any]:
    """Those of the wanted arguments that the module's forward method takes."""
    parameters = inspect.signature(type(module).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {
        name: value for name, value in wanted.items() if name in parameters or (name == "return_dict" and takes_any)
    }


def _apart(feeds: Tensors) -> tuple[dict[str, Any], dict[tuple[int, str], Any]]:
    """Inputs that are not of the cache, and those of the cache by layer and kind."""
    matches = {name: _CACHED.fullmatch(name) for name in feeds}
    given = {name: value for name, value in feeds.items() if matches[name] is None}
    return given, {(int(m[1]), m[2]): feeds[name] for name, m in matches.items() if m is not None}


def _cache(past: Mapping[tuple[int, str], Any]) -> Any:
    """A cache that holds these keys and values. Layers with a sliding window keep all: their masks forget."""
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
