"""Texts to tokens: the calls of a tokenizer whose files somebody else wrote, and which may fail in any way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput


def encode(tokenizer: Any, folder: Path, *texts: Any, **options: Any) -> Any:
    """The tokens of a text or several, as the tokenizer in ``folder`` gives them.

    BadInput if it cannot: the library raises bare exceptions of its own, say for a vocabulary without the token that
    stands for unknown words.
    """
    try:
        return tokenizer(*texts, **options)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"its tokenizer cannot read this text ({said})", where=folder) from error


def length_limit(tokenizer: Any, folder: Path) -> float:
    """Most tokens of one text by the tokenizer's own files; BadInput if they say something else than a number."""
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise BadInput(f"model_max_length is {limit!r}", where=folder / "tokenizer_config.json")
    return limit
