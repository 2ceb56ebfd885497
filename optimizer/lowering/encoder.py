"""Encoders of whatever architecture: the inputs are found by asking the module, not by a list of model types."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.lowering import module as exporter
from planish.optimizer.lowering.checkpoint import Checkpoint, bind, loaded, skeleton, tensors_of
from planish.optimizer.lowering.depth import cut, find_stack, grow
from planish.optimizer.lowering.original import CheckpointOriginal, TorchOriginal
from planish.optimizer.lowering.tasks import TASKS
from planish.optimizer.program import Axis, Program, Provenance, Role, Signature, TensorSpec

_LONGEST = 1 << 20
"""Tokenizers that know no limit say so with a huge number; anything above this is no limit."""
_SAMPLE = {"batch": 2, "choices": 3, "sequence": 16}
"""Sizes of the traced inputs: all above one and all different, so that none is taken for another."""


def lower(checkpoint: Checkpoint, *, background: bool = True) -> tuple[Program, TorchOriginal]:
    """Lower an encoder checkpoint: the program, its weights still in the checkpoint, and its original in PyTorch.

    With ``background`` the original is loaded by a process of its own meanwhile.
    """
    original = (
        CheckpointOriginal(checkpoint.folder, checkpoint.task)
        if background
        else TorchOriginal(lambda: loaded(checkpoint), ())
    )
    model = skeleton(checkpoint)
    spec = TASKS[checkpoint.task]
    inputs = find_inputs(model, checkpoint)
    binding = bind(model, checkpoint)
    constants = _constants(model)
    original.ask_for(spec.outputs, constants)
    axes = {tensor.name: {i: d for i, d in enumerate(tensor.shape) if isinstance(d, str)} for tensor in inputs}
    sample = exporter.to_torch(_sample(inputs))
    graph, ranges = _trace(model, sample, axes, spec.outputs, constants)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    binding.refuse_absent(exporter.parameters_of(graph), model, checkpoint)
    computed = _computed(parameters - binding.stored.keys() - binding.absent, checkpoint)
    exporter.adopt_weights(graph, tensors_of(binding.stored) | computed, parameters)
    exporter.fold_stored_transposes(graph)
    ranges["sequence"] = _sequence_axis(ranges["sequence"], model, checkpoint)
    signature = Signature(_used(inputs, graph), _outputs(graph, spec.role), ranges)
    program = Program(
        {"model": graph},
        {"model": signature},
        checkpoint.task,
        Provenance("checkpoint", type(model).__name__, checkpoint.hashes()),
    )
    return program, original


def _trace(model: Any, sample: Any, axes: exporter.Axes, outputs: Any, constants: Any) -> tuple[ir.Model, Any]:
    """Export the model, by way of its first layers if the others are copies of them.

    A model that mixes its parameters with tensors it makes on the CPU does not trace on the meta device: it gets memory
    that nobody writes or reads, which costs addresses only. One that counts its layers is traced whole.
    """
    stack = find_stack(model)
    for depth in [stack, None] if stack is not None else [None]:
        for addresses in (False, True):
            if addresses:
                _give_addresses(model)
            try:
                with cut(model, depth) if depth is not None else nullcontext():
                    graph, ranges = exporter.export(model, sample, axes, outputs, constants)
            except BadInput as error:
                failure = error
                continue
            if depth is None or grow(graph, depth):
                return graph, ranges
    raise failure


def _give_addresses(model: Any) -> None:
    """Replace parameters on the meta device by uninitialized ones on the CPU, tied ones by one and the same."""
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                fresh = made.setdefault(
                    id(parameter), torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), False)
                )
                module._parameters[name] = fresh


def find_inputs(model: Any, checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """The inputs that the forward method of ``model`` takes and that its tokenizer can give.

    Ids and mask whenever they are parameters; segments where the model tells more than one apart; boxes where it has
    a table for them. BadInput if it takes no token ids, or needs something else as well.
    """
    parameters = inspect.signature(type(model).forward).parameters
    config = checkpoint.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(
            f"{type(model).__name__} has a decoder, which this version does not lower", where=checkpoint.folder
        )
    shape = (*TASKS[checkpoint.task].leading, "sequence")
    pad = getattr(config, "pad_token_id", None)
    vocabulary = _vocabulary(model, config)
    segments = int(getattr(config, "type_vocab_size", 0) or 0)
    candidates = [
        TensorSpec("input_ids", ir.DataType.INT64, shape, Role.TOKENS, vocabulary, pad if isinstance(pad, int) else 0),
        TensorSpec("attention_mask", ir.DataType.INT64, shape, Role.MASK, 2),
        TensorSpec("token_type_ids", ir.DataType.INT64, shape, Role.SEGMENTS, segments),
        TensorSpec("bbox", ir.DataType.INT64, (*shape, 4), Role.BOXES, _box_bound(config)),
    ]
    absent = {"token_type_ids"} if segments < 2 else set()
    absent |= {"bbox"} if not _box_bound(config) else set()
    found = tuple(tensor for tensor in candidates if tensor.name in parameters and tensor.name not in absent)
    required = {
        name
        for name, parameter in parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } - {tensor.name for tensor in found}
    if not found or found[0].name != "input_ids" or required:
        what = f"also needs {', '.join(sorted(required))}" if required else "takes no token ids"
        raise BadInput(
            f"{type(model).__name__} {what}: it is not a text encoder",
            where=checkpoint.folder,
            advice="lower it from Python as an nn.Module with sample inputs",
        )
    return found


def _vocabulary(model: Any, config: Any) -> int:
    """Rows of the table of token embeddings; what the configuration says where the model does not show one."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    weight = getattr(table, "weight", table)
    return int(weight.shape[0]) if weight is not None else int(getattr(config, "vocab_size", None) or 2)


def _box_bound(config: Any) -> int:
    return int(getattr(config, "max_2d_position_embeddings", 0) or 0)


def _constants(model: Any) -> dict[str, Any]:
    """Arguments that every call gets: results by name, no cache."""
    parameters = inspect.signature(type(model).forward).parameters
    wanted = {"return_dict": True, "use_cache": False}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {
        name: value for name, value in wanted.items() if name in parameters or (name == "return_dict" and takes_any)
    }


def _sample(inputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    """Harmless values of the traced shape: token 1 everywhere, everything visible, first segment."""
    found = {}
    for tensor in inputs:
        shape = tuple(_SAMPLE[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
        fill = 1 if tensor.role in (Role.TOKENS, Role.MASK) else 0
        found[tensor.name] = np.full(shape, fill, tensor.numpy_dtype())
    return found


def _computed(absent: set[str], checkpoint: Checkpoint) -> dict[str, ir.TensorProtocol]:
    """Parameters that no stored tensor is, alone: transformers computes them, so its loaded model is asked."""
    if not absent:
        return {}
    state = loaded(checkpoint).state_dict()
    return {name: ir.tensor(np.array(state[name].float().numpy()), name=name) for name in absent if name in state}


def _sequence_axis(axis: Axis, model: Any, checkpoint: Checkpoint) -> Axis:
    """The longest sequence: what the trace allows, what the position table holds, what the tokenizer says."""
    limits = [axis.maximum, _position_limit(model, checkpoint.config), _tokenizer_limit(checkpoint.folder)]
    known = [limit for limit in limits if limit is not None and limit < _LONGEST]
    return replace(axis, maximum=min(known, default=None))


def _position_limit(model: Any, config: Any) -> int | None:
    """Rows of the position table that a sequence can use: tables with a padding row start behind it."""
    rows = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(rows, int) or rows <= 0:
        return None
    paddings = [
        module.padding_idx
        for name, module in model.named_modules()
        if "position" in name and hasattr(module, "padding_idx") and module.weight.shape[0] == rows
    ]
    offset = next((padding + 1 for padding in paddings if padding is not None), 0)
    return rows - offset


def _tokenizer_limit(folder: Path) -> int | None:
    import json

    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        limit = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
    except (ValueError, AttributeError):
        raise BadInput("this is not JSON", where=path) from None
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _LONGEST else None


def _used(inputs: tuple[TensorSpec, ...], graph: ir.Model) -> tuple[TensorSpec, ...]:
    """Inputs that something reads; the others are dropped from the graph as well."""
    used = {value.name for value in graph.graph.inputs if value.uses()}
    for value in [value for value in graph.graph.inputs if value.name not in used]:
        graph.graph.inputs.remove(value)
    return tuple(tensor for tensor in inputs if tensor.name in used)


def _outputs(graph: ir.Model, role: Role) -> tuple[TensorSpec, ...]:
    return tuple(border_spec(value, role) for value in graph.graph.outputs)


def border_spec(value: ir.Value, role: Role) -> TensorSpec:
    """Name, type and shape of a graph input or output; an axis without a name gets one from its place."""
    shape = tuple(
        dim if isinstance(dim, int) else (dim.value or f"{value.name}_{index}")
        for index, dim in enumerate(value.shape or ())
    )
    return TensorSpec(value.name or "", value.dtype or ir.DataType.FLOAT, shape, role)
