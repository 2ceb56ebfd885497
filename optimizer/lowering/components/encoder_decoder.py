"""Encoder-decoders: the encoder runs once, then the decoder without a past, then the decoder with a past.

The first decoder step also computes the keys and values of the encoder's states; further steps read them from the
cache. File and tensor names are those of the ecosystem's loaders.
"""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Role, TensorSpec
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components import speech_encoder
from planish.optimizer.lowering.components.component import Component, probing
from planish.optimizer.lowering.components.encoder import vocabulary_of

_ENCODED = "encoder_sequence"


def encoder(model: Any, checkpoint: Checkpoint) -> Component:
    """Tokens, or a spectrogram, to hidden states."""
    if not hasattr(model, "get_encoder") or "encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise BadInput(f"{type(model).__name__} has no encoder apart from its decoder", where=checkpoint.folder)
    read = (_ids(model, checkpoint), _mask("attention_mask", "sequence"))
    inputs = speech_encoder.find_inputs(model, checkpoint) if speech_encoder.hears(model) else read
    return Component("encoder_model", "encoder", inputs, ("last_hidden_state",), Role.HIDDEN)


def first_decoder(model: Any, checkpoint: Checkpoint) -> Component:
    """The first decoder step, without a cache."""
    shapes = cache_shapes(model, checkpoint)
    length, width = _states(model, checkpoint)
    states = TensorSpec("encoder_hidden_states", ir.DataType.FLOAT, ("batch", length, width))
    inputs = (_ids(model, checkpoint), *_encoder_mask(length), states)
    outputs = ("logits", *(f"present.{name}" for name in shapes))
    return Component("decoder_model", "first_decoder", inputs, outputs, Role.LOGITS)


def next_decoder(model: Any, checkpoint: Checkpoint) -> Component:
    """Further decoder steps with a cache."""
    shapes = cache_shapes(model, checkpoint)
    length, _ = _states(model, checkpoint)
    lengths = {"decoder": PAST, "encoder": length}
    past = tuple(
        TensorSpec(
            f"past_key_values.{name}",
            ir.DataType.FLOAT,
            ("batch", heads, lengths[name.split(".")[1]], size),
            Role.CACHE,
        )
        for name, (heads, size) in shapes.items()
    )
    inputs = (_ids(model, checkpoint), *_encoder_mask(length), *past)
    outputs = ("logits", *(f"present.{name}" for name in shapes if ".decoder." in name))
    return Component("decoder_with_past_model", "next_decoder", inputs, outputs, Role.LOGITS)


def _ids(model: Any, checkpoint: Checkpoint) -> TensorSpec:
    config = checkpoint.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    vocabulary = vocabulary_of(model, config)
    return TensorSpec(
        "input_ids",
        ir.DataType.INT64,
        ("batch", "sequence"),
        Role.TOKENS,
        vocabulary,
        pad if isinstance(pad, int) else 0,
    )


def _mask(name: str, axis: str) -> TensorSpec:
    return TensorSpec(name, ir.DataType.INT64, ("batch", axis), Role.MASK, 2)


def _encoder_mask(length: int | str) -> tuple[TensorSpec, ...]:
    """The mask over the encoder's states; states of static length need none."""
    return (_mask("encoder_attention_mask", length),) if isinstance(length, str) else ()


def _states(model: Any, checkpoint: Checkpoint) -> tuple[int | str, int]:
    """Number and size of the encoder's states: one per token, or those of a spectrogram."""
    return (
        speech_encoder.states(model, checkpoint)
        if speech_encoder.hears(model)
        else (_ENCODED, _width(model, checkpoint))
    )


def _width(model: Any, checkpoint: Checkpoint) -> int:
    """Size of the encoder's states."""
    config = checkpoint.config.get_text_config()
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if not isinstance(width, int):
        raise BadInput(f"{type(model).__name__} does not tell the width of its encoder", where=checkpoint.folder)
    return width


def cache_shapes(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Number of heads and head size of each cache tensor, by layer, side and kind: `0.decoder.key`."""
    import torch

    with probing(model, checkpoint):
        ids = torch.ones(2, 3, dtype=torch.long)
        read = speech_encoder.silence(model, checkpoint) if speech_encoder.hears(model) else {"input_ids": ids}
        cache = model(**read, decoder_input_ids=ids, use_cache=True, return_dict=True).past_key_values
        sides = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
        return {
            f"{index}.{side}.{kind}": (int(tensor.shape[1]), int(tensor.shape[3]))
            for index in range(len(cache.self_attention_cache.layers))
            for side, part in sides.items()
            for kind, tensor in (("key", part.layers[index].keys), ("value", part.layers[index].values))
            if tensor is not None  # a layer that was cut off has not been filled
        }
