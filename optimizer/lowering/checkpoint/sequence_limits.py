"""Maximum sequence lengths, from the position table, the tokenizer, and the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Axis
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint
from planish.optimizer.lowering.components import rope
from planish.optimizer.runtime.tokenization import ENDLESS
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.links import file_in

_LIMITS = (
    "max_position_embeddings", "max_target_positions", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "max_encoder_position_embeddings", "max_decoder_position_embeddings",
)  # fmt: skip
"""Names of the maximum sequence length in configurations."""


def limit_axes(axes: Mapping[str, Axis], model: Any, checkpoint: Checkpoint) -> dict[str, Axis]:
    """The axes, with token axes limited by the model and its tokenizer."""
    limits = [_position_limit(model, checkpoint.config), _tokenizer_limit(checkpoint.folder)]
    # Tokenizers without a limit report about 1e30.
    finite = [limit for limit in limits if limit is not None and limit < ENDLESS]
    return {name: _limited(axis, finite) if name.endswith(("sequence", PAST)) else axis for name, axis in axes.items()}


def _limited(axis: Axis, limits: list[int]) -> Axis:
    """The maximum past, which leaves room for one token."""
    shorter = [limit - (axis.name == PAST) for limit in limits]
    return replace(axis, maximum=min([*shorter, *([] if axis.maximum is None else [axis.maximum])], default=None))


def _position_limit(model: Any, config: Any) -> int | None:
    """Number of positions of the model: that of the configuration, or less if a table has fewer rows.

    Dynamic NTK scaling exceeds the number in its configuration.
    """
    config = config.get_text_config()
    stretched = rope.longest(config)
    configured = [getattr(config, name, None) for name in _names_of_limits(config)]
    numbers = [number for number in configured if isinstance(number, int) and number > 0]
    return min([stretched or min(numbers), *_table_limits(model)]) if numbers else None


def _names_of_limits(config: Any) -> list[str]:
    """The maximum length by this class of configuration; keys of other classes are ignored."""
    names = [name for name in _LIMITS if hasattr(type(config), name) or name in config.attribute_map]
    return names or [name for name in _LIMITS[:2] if hasattr(config, name)][:1]


def _table_limits(model: Any) -> list[int]:
    """Rows of position tables after their padding row, where positions start.

    Tables of sines may be buffers called `weights`, which grow in PyTorch and are static in a graph.
    """
    tables = [
        (getattr(module, "weight", getattr(module, "weights", None)), module.padding_idx)
        for name, module in model.named_modules()
        if "position" in name and isinstance(getattr(module, "padding_idx", None), int)
    ]
    return [table.shape[0] - padding - 1 for table, padding in tables if table is not None]


def _tokenizer_limit(folder: Path) -> int | None:
    path = file_in(folder, "tokenizer_config.json")
    if path is None:
        return None
    limit = read_object(path).get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < ENDLESS else None
