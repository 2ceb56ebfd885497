"""A checkpoint becomes a program: one component or several, their weights still in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planish.optimizer.lowering import decoder, encoder, encoder_decoder
from planish.optimizer.lowering.checkpoint import Checkpoint, bind, loaded, skeleton
from planish.optimizer.lowering.component import Describe, lower_component
from planish.optimizer.lowering.limits import limit_axes
from planish.optimizer.lowering.original import CheckpointOriginal, TorchOriginal
from planish.optimizer.lowering.tasks import TASKS, Family
from planish.optimizer.program import Program, Provenance

_DESCRIPTIONS: Mapping[Family, Sequence[Describe]] = {
    Family.ENCODER: (encoder.describe,),
    Family.DECODER: (decoder.describe,),
    Family.ENCODER_DECODER: (encoder_decoder.encoder, encoder_decoder.first_decoder, encoder_decoder.next_decoder),
}
"""The components that serve a family of tasks, in the order in which they run."""


def lower(checkpoint: Checkpoint, *, background: bool = True) -> tuple[Program, TorchOriginal]:
    """Lower a checkpoint: the program, and its original in PyTorch.

    With ``background`` the original is loaded by a process of its own meanwhile.
    """
    original = (
        CheckpointOriginal(checkpoint.folder, checkpoint.task, checkpoint.adapter)
        if background
        else TorchOriginal(lambda: loaded(checkpoint))
    )
    model = skeleton(checkpoint)
    binding = bind(model, checkpoint)
    program = Program({}, {}, checkpoint.task, Provenance("checkpoint", type(model).__name__, checkpoint.hashes()))
    for describe in _DESCRIPTIONS[TASKS[checkpoint.task].family]:
        component, graph, signature = lower_component(model, describe, binding, checkpoint)
        axes = limit_axes(signature.axes, model, checkpoint)
        program.components[component.name] = graph
        program.signatures[component.name] = replace(signature, axes=axes)
        original.ask_for(component.name, component.call, [tensor.name for tensor in signature.outputs])
    return program, original
