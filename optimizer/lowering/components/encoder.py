"""Encoders of any architecture: inputs are determined from the module's signature, not from a list of model types."""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.program import Role, TensorSpec
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components import vision_encoder
from planish.optimizer.lowering.components.calls import required_parameters
from planish.optimizer.lowering.components.component import Component
from planish.optimizer.lowering.components.tasks import TASKS, is_in_no_table


def describe(model: Any, checkpoint: Checkpoint) -> Component:
    """The only component of an encoder."""
    spec = TASKS[checkpoint.task]
    outputs = () if is_in_no_table(type(model).__name__, checkpoint.task) else spec.outputs
    find = vision_encoder.find_inputs if vision_encoder.sees(model) else find_inputs
    return Component("model", "plain", find(model, checkpoint), outputs, spec.role)


def find_inputs(model: Any, checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """The inputs that the forward method of ``model`` takes and a tokenizer gives.

    Token ids and mask if they are parameters; segments if the model has several; boxes if it has a table for them.
    BadInput if it takes no token ids, or requires other inputs.
    """
    parameters = inspect.signature(type(model).forward).parameters
    config = checkpoint.config.get_text_config()
    if "decoder_input_ids" in parameters:
        raise BadInput(
            f"{type(model).__name__} has a decoder, which this version does not lower", where=checkpoint.folder
        )
    if "pixel_values" in parameters:
        raise BadInput(
            f"{type(model).__name__} takes texts and images in one call, which this version does not lower",
            where=checkpoint.folder,
            advice="save the part that is needed, such as CLIPTextModelWithProjection, as a checkpoint of its own",
        )
    shape = (*TASKS[checkpoint.task].leading, "sequence")
    pad = getattr(config, "pad_token_id", None)
    vocabulary = vocabulary_of(model, config)
    segments = int(getattr(config, "type_vocab_size", 0) or 0)
    candidates = [
        TensorSpec("input_ids", ir.DataType.INT64, shape, Role.TOKENS, vocabulary, pad if isinstance(pad, int) else 0),
        TensorSpec("attention_mask", ir.DataType.INT64, shape, Role.MASK, 2),
        TensorSpec("token_type_ids", ir.DataType.INT64, shape, Role.SEGMENTS, segments),
        TensorSpec("bbox", ir.DataType.INT64, (*shape, 4), Role.BOXES, _box_bound(config)),
    ]
    absent = {"token_type_ids"} if segments < 2 else set()
    absent |= {"bbox"} if not _box_bound(config) else set()
    taken = tuple(tensor for tensor in candidates if tensor.name in parameters and tensor.name not in absent)
    required = required_parameters(model) - {tensor.name for tensor in taken}
    # A required input of another kind (images, spectrograms) has no generated values here.
    if not taken or taken[0].name != "input_ids" or required:
        what = f"also needs {', '.join(sorted(required))}" if required else "takes no token ids"
        raise BadInput(
            f"{type(model).__name__} {what}: it is no encoder of texts or images",
            where=checkpoint.folder,
            advice="lower it from Python as an nn.Module with sample inputs",
        )
    return taken


def vocabulary_of(model: Any, config: Any) -> int:
    """Rows of the token embedding table; the configuration's vocabulary size if the table is unknown."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    weight = getattr(table, "weight", table)
    return int(weight.shape[0]) if weight is not None else int(getattr(config, "vocab_size", None) or 2)


def _box_bound(config: Any) -> int:
    return int(getattr(config, "max_2d_position_embeddings", 0) or 0)
