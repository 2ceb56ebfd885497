"""Lowering of a checkpoint to a program of one or several components; weights stay in the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from planish.optimizer.ir.program import Program, Provenance
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint, bind, loaded, skeleton
from planish.optimizer.lowering.checkpoint.sequence_limits import limit_axes
from planish.optimizer.lowering.components import decoder, encoder, encoder_decoder, rope
from planish.optimizer.lowering.components.component import Describe, lower_component
from planish.optimizer.lowering.components.tasks import TASKS, Family
from planish.optimizer.lowering.original.original import CheckpointOriginal, OffloadedOriginal, TorchOriginal
from planish.optimizer.system.machine import demand_memory

_DESCRIPTIONS: Mapping[Family, Sequence[Describe]] = {
    Family.ENCODER: (encoder.describe,),
    Family.DECODER: (decoder.describe,),
    Family.ENCODER_DECODER: (encoder_decoder.encoder, encoder_decoder.first_decoder, encoder_decoder.next_decoder),
}
"""The components of a family of tasks, in execution order."""


def lower(checkpoint: Checkpoint, kind: Literal["here", "background", "offload"]) -> tuple[Program, TorchOriginal]:
    """Lower a checkpoint to a program, and its original in PyTorch, loaded in this process on demand (`here`).

    With `background`, another process loads it meanwhile: OutOfResources if it does not fit. With `offload`, its
    weights stay on the disk.
    """
    original = _original(checkpoint, kind)
    model = skeleton(checkpoint)
    rope.trace_frequencies(model)
    binding = bind(model, checkpoint)
    notes = (*_other_class(type(model).__name__, checkpoint), *rope.notes(model))
    provenance = Provenance("checkpoint", type(model).__name__, checkpoint.hashes(), notes)
    program = Program({}, {}, checkpoint.task, provenance)
    for describe in _DESCRIPTIONS[TASKS[checkpoint.task].family]:
        component, graph, signature = lower_component(model, describe, binding, checkpoint)
        axes = limit_axes(signature.axes, model, checkpoint)
        program.components[component.name] = graph
        program.signatures[component.name] = replace(signature, axes=axes)
        if component.left_out:
            said = f"outputs of {type(model).__name__} that are not taken: {', '.join(component.left_out)}"
            program.provenance = replace(program.provenance, notes=(*program.provenance.notes, said))
        original.ask_for(component.name, component.call, [tensor.name for tensor in signature.outputs])
    return program, original


def _other_class(lowered: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note for the manifest if the head differs from the saved one."""
    named = checkpoint.architecture
    said = f"config.json names {named}; lowered is {lowered}, which serves {checkpoint.task}"
    return (said,) if named is not None and named != lowered else ()


def _original(checkpoint: Checkpoint, kind: str) -> TorchOriginal:
    where = checkpoint.folder, checkpoint.task, checkpoint.adapter
    if kind == "here":
        return TorchOriginal(lambda: loaded(checkpoint))
    if kind == "offload":
        return OffloadedOriginal(*where)
    elements = sum(math.prod(stored.stored_shape) for stored in checkpoint.weights.values())
    demand_memory(
        4 * elements,
        "the original model in float32",
        "check it with --reference offload, which reads weights as they are used, or not at all with --reference none",
        where=checkpoint.folder,
    )
    return CheckpointOriginal(*where)
