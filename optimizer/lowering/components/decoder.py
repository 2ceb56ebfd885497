"""Decoders with a KV cache of any architecture: a run without data determines the layout of the cache."""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Role, TensorSpec
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components.component import Component, probing, total
from planish.optimizer.lowering.components.encoder import vocabulary_of

_SCORES = ("logits",)


def describe(model: Any, checkpoint: Checkpoint) -> Component:
    """One graph for prefill and decode: new tokens after a past of any length, or none.

    Positions are an input if the module takes them, as for the ecosystem's loaders: rows of a padded batch have
    different positions.
    """
    parameters = inspect.signature(type(model).forward).parameters
    vocabulary = vocabulary_of(model, checkpoint.config.get_text_config())
    batch, length = "batch", total(PAST, "sequence")
    inputs = [
        TensorSpec("input_ids", ir.DataType.INT64, (batch, "sequence"), Role.TOKENS, vocabulary),
        TensorSpec("attention_mask", ir.DataType.INT64, (batch, length), Role.MASK, 2),
        TensorSpec("position_ids", ir.DataType.INT64, (batch, "sequence"), Role.POSITIONS),
    ]
    if "input_ids" not in parameters or "past_key_values" not in parameters:
        raise BadInput(f"{type(model).__name__} takes no cache: it is not a text decoder", where=checkpoint.folder)
    if checkpoint.last_logits and "logits_to_keep" not in parameters:
        raise UsageError(f"{type(model).__name__} scores every token", where="--logits last", advice="leave it out")
    taken = tuple(tensor for tensor in inputs if tensor.name in parameters)
    shapes = cache_shapes(model, checkpoint)
    past = tuple(
        TensorSpec(f"past_key_values.{name}", ir.DataType.FLOAT, (batch, heads, PAST, size), Role.CACHE)
        for name, (heads, size) in shapes.items()
    )
    call = "last_decoder" if checkpoint.last_logits else "decoder"
    return Component("model", call, (*taken, *past), (*_SCORES, *(f"present.{n}" for n in shapes)), Role.LOGITS)


def cache_shapes(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Number of heads and head size of each cache tensor, by layer and kind: `0.key`."""
    import torch

    with probing(model, checkpoint):
        cache = model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True, return_dict=True).past_key_values
        if cache is None:
            raise BadInput(f"{type(model).__name__} makes no cache: it is not a decoder", where=checkpoint.folder)
        return {
            f"{index}.{kind}": (int(tensor.shape[1]), int(tensor.shape[3]))
            for index, layer in enumerate(cache.layers)
            for kind, tensor in (("key", layer.keys), ("value", layer.values))
            if tensor is not None  # a layer that was cut off has not been filled
        }
