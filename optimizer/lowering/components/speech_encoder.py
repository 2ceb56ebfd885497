"""Speech encoders with spectrograms of one length, which a trial run determines (not the model type)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.program import Role, TensorSpec
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components.component import probing, sample_of

NAME = "input_features"
_FRAMES_A_STATE = 2
"""Frames per position of the encoder: a convolution halves their number."""


def hears(model: Any) -> bool:
    """True if the first input of a module is a spectrogram."""
    return getattr(model, "main_input_name", None) == NAME


def find_inputs(model: Any, checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """The spectrogram of a recording, (batch, bins, frames), padded to a static number of frames."""
    config = checkpoint.config
    bins, positions = (getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not isinstance(bins, int) or not isinstance(positions, int):
        raise BadInput(
            f"config.json of {type(model).__name__} names no num_mel_bins and max_source_positions",
            where=checkpoint.folder,
            advice="speech is lowered where spectra have one length, as Whisper's do",
        )
    return (TensorSpec(NAME, ir.DataType.FLOAT, ("batch", bins, _FRAMES_A_STATE * positions), Role.FEATURES),)


def states(model: Any, checkpoint: Checkpoint) -> tuple[int, int]:
    """Number and size of the encoder's states; BadInput if it rejects the inputs of `find_inputs`."""
    (spectrum,) = find_inputs(model, checkpoint)
    with probing(model, checkpoint, f"{type(model).__name__} takes no spectra of {spectrum.shape[1:]}"):
        hidden = model.get_encoder()(**silence(model, checkpoint), return_dict=True).last_hidden_state
        return int(hidden.shape[1]), int(hidden.shape[2])


def silence(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Spectrograms of zeros for the module."""
    import torch

    sample = sample_of(find_inputs(model, checkpoint))
    return {name: torch.from_numpy(array) for name, array in sample.items()}
