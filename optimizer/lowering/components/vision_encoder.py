"""Vision encoders: inputs have the configuration's number of channels, and one static image size."""

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
    """True if the first input of a module is an image."""
    return getattr(model, "main_input_name", None) == _NAME


def find_inputs(model: Any, checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """Images of one size, (batch, channels, height, width); BadInput if the module requires other inputs.

    Height and width are static: position tables, windows and pooling are built for them.
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
    """Height and width from config.json, or else from the image processor."""
    said = getattr(checkpoint.config, "image_size", None)
    # The configuration determines the tables of positions; the processor may resize to another size.
    size = _pair(said) if said is not None else _processed(checkpoint.folder)
    if size is None:
        raise BadInput(
            f"neither config.json nor {_PROCESSOR} tells the size of its images",
            where=checkpoint.folder,
            advice='write "image_size": [height, width] into config.json',
        )
    return size


def _processed(folder: Path) -> tuple[int, int] | None:
    """The crop size, or else the resize size, in the processor's settings; None without settings."""
    path = file_in(folder, _PROCESSOR)
    if path is None:
        return None
    settings = read_object(path)
    cropped = _pair(settings.get("crop_size")) if settings.get("do_center_crop", True) else None
    return cropped or _pair(settings.get("size"))


def _pair(size: object) -> tuple[int, int] | None:
    """Height and width from any form of a size in configurations; None for other forms."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    whole = [side for side in sides if isinstance(side, int) and side > 0]
    return (whole[0], whole[1]) if len(whole) == 2 else None
