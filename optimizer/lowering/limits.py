"""How long a sequence may be: what the position table holds, what the tokenizer says, what the trace allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planish.optimizer.json_files import read_object
from planish.optimizer.lowering import rope
from planish.optimizer.lowering.checkpoint import Checkpoint
from planish.optimizer.lowering.links import file_in
from planish.optimizer.program import PAST, Axis

_LONGEST = 1 << 20
"""Tokenizers that know no limit say so with a huge number; anything above this is no limit."""


def limit_axes(axes: Mapping[str, Axis], model: Any, checkpoint: Checkpoint) -> dict[str, Axis]:
    """The axes, those along which tokens run no longer than the model and its tokenizer allow."""
    limits = [_position_limit(model, checkpoint.config), _tokenizer_limit(checkpoint.folder)]
    known = [limit for limit in limits if limit is not None and limit < _LONGEST]
    return {name: _limited(axis, known) if name.endswith(("sequence", PAST)) else axis for name, axis in axes.items()}


def _limited(axis: Axis, limits: list[int]) -> Axis:
    """A past leaves room for one token at least."""
    shorter = [limit - (axis.name == PAST) for limit in limits]
    return replace(axis, maximum=min([*shorter, *([] if axis.maximum is None else [axis.maximum])], default=None))


def _position_limit(model: Any, config: Any) -> int | None:
    """Rows of the position table that a sequence can use: tables with a padding row start behind it."""
    config = config.get_text_config()
    rows = getattr(config, "max_position_embeddings", getattr(config, "max_target_positions", None))
    if not isinstance(rows, int) or rows <= 0:
        return None
    paddings = [
        module.padding_idx
        for name, module in model.named_modules()
        if "position" in name and hasattr(module, "padding_idx") and module.weight.shape[0] == rows
    ]
    rows = rope.longest(config) or rows
    offset = next((padding + 1 for padding in paddings if padding is not None), 0)
    return rows - offset


def _tokenizer_limit(folder: Path) -> int | None:
    path = file_in(folder, "tokenizer_config.json")
    if path is None:
        return None
    limit = read_object(path).get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _LONGEST else None
