"""Encoders of speech that read a spectrum of one length: the length is found by trying it, not by model type."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.program import Role, TensorSpec
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components.component import probing, sample_of

NAME = "input_features"
_FRAMES_A_STATE = 2
"""Frames of a spectrum for each of the encoder's positions: a convolution halves their number."""


def hears(model: Any) -> bool:
    """Whether spectra are what a module takes first."""
    return getattr(model, "main_input_name", None) == NAME


def find_inputs(model: Any, checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """The spectrum of a recording, (batch, bins, frames); every recording is padded to the same number of frames."""
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
    """Number and size of the encoder's states; BadInput if it does not take what `find_inputs` says."""
    (spectrum,) = find_inputs(model, checkpoint)
    with probing(model, checkpoint, f"{type(model).__name__} takes no spectra of {spectrum.shape[1:]}"):
        found = model.get_encoder()(**silence(model, checkpoint), return_dict=True).last_hidden_state
        return int(found.shape[1]), int(found.shape[2])


def silence(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Spectra of zeros, as the module takes them."""
    import torch

    sample = sample_of(find_inputs(model, checkpoint))
    return {name: torch.from_numpy(array) for name, array in sample.items()}
