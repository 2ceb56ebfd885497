"""The tokenizer of a checkpoint or engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput, in_one_line
from planish.optimizer.lowering.checkpoint.checkpoint import quiet
from planish.optimizer.system.links import file_in


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in a folder, or None; neither runs code of the folder nor downloads files."""
    if not any(file_in(folder, name) for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadInput(f"its tokenizer cannot be loaded: {in_one_line(error)}", where=folder) from error
