"""Encoders of images: what they take is their configuration's number of channels, and one size of image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.program import Role, TensorSpec
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components.calls import required_parameters
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.links import file_in

_NAME = "pixel_values"
_PROCESSOR = "preprocessor_config.json"
_CHANNELS = 3


def sees(model: Any) -> bool:
    """Whether images are what a module takes first."""
    return getattr(model, "main_input_name", None) == _NAME


def find_inputs(model: Any, checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """Images of one size, (batch, channels, height, width); BadInput if the module needs something beside them.

    Height and width are fixed: tables of positions, windows and pooling are made for them.
    """
    parameters = inspect.signature(type(model).forward).parameters
    others = required_parameters(model) - {_NAME}
    if _NAME not in parameters or others or "input_ids" in parameters:
        what = ", ".join(sorted(others)) or ("texts" if "input_ids" in parameters else "other inputs")
        raise BadInput(
            f"{type(model).__name__} needs {what} beside images: it is no encoder of images",
            where=checkpoint.folder,
            advice="lower it from Python as an nn.Module with sample inputs",
        )
    channels = getattr(checkpoint.config, "num_channels", _CHANNELS)
    height, width = _size(checkpoint)
    return (TensorSpec(_NAME, ir.DataType.FLOAT, ("batch", channels, height, width), Role.PIXELS),)


def _size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width: what config.json says, or what the images are processed to where it says nothing."""
    said = getattr(checkpoint.config, "image_size", None)
    found = _pair(said) if said is not None else _processed(checkpoint.folder)
    if found is None:
        raise BadInput(
            f"neither config.json nor {_PROCESSOR} tells the size of its images",
            where=checkpoint.folder,
            advice='write "image_size": [height, width] into config.json',
        )
    return found


def _processed(folder: Path) -> tuple[int, int] | None:
    """What images are cropped to, or else resized to, by the processor's settings; None if there are none."""
    path = file_in(folder, _PROCESSOR)
    if path is None:
        return None
    settings = read_object(path)
    cropped = _pair(settings.get("crop_size")) if settings.get("do_center_crop", True) else None
    return cropped or _pair(settings.get("size"))


def _pair(size: object) -> tuple[int, int] | None:
    """Height and width of a size in any of the forms that configurations have; None if it is none of them."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    whole = [side for side in sides if isinstance(side, int) and side > 0]
    return (whole[0], whole[1]) if len(whole) == 2 else None
