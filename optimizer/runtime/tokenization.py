"""Texts to tokens: with the tokenizer of transformers, or, where a build found it to do the same, with its core alone.

Importing transformers takes seconds; the package tokenizers, on which its tokenizers are built, takes none. Whether
`tokenizer.json` read by that package gives what `AutoTokenizer` gives cannot be told from the file: transformers builds
some tokenizers anew from their vocabulary and other files. A build compares the two and records what it found.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from planish.optimizer.errors import BadInput, in_one_line
from planish.optimizer.system.json_files import parse_json

FILE = "tokenizer.json"
LIGHT_TASKS = frozenset(
    {"feature-extraction", "multiple-choice", "question-answering", "text-classification", "token-classification"}
)
"""Tasks that only encode: what decodes texts takes the tokenizer of transformers."""
ENDLESS = 1 << 20
"""Tokenizers that know no limit say so with a huge number: from here on it is none."""
_PROBES = ("", "a", "Naïve  CAFÉ, 日本語 \U0001f600\n\tw1 w2 [MASK] <s>", "word " * 40)
_PAIR = "Second text: isn't it?"
_ATTRIBUTES = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
"""Attributes of an encoding of the package tokenizers, by the names that transformers gives its arrays."""
_TRANSFORMERS_LOCK = threading.Lock()
"""A lock held while a tokenizer of transformers encodes: it, too, sets padding and truncation at each call."""
Id = Annotated[int, Field(ge=0, lt=1 << 32)]


class TokenizerRecord(BaseModel):
    """Settings for `tokenizer.json` used by itself: those that `AutoTokenizer` would have taken from other files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    inputs: list[str]
    """Names of the arrays that it gives."""
    limit: Annotated[int, Field(ge=1)] | None
    """Most tokens of a text; None if there is no limit."""
    pad_id: Id
    pad_type_id: Id
    pad_token: str
    padding_side: Annotated[str, Field(pattern="^(left|right)$")]
    truncation_side: Annotated[str, Field(pattern="^(left|right)$")]
    special_ids: list[Id]


class LightEncoded(dict[str, Any]):
    """Arrays (or, of a single text, lists) by name, and of each token the text of a pair that it belongs to."""

    def __init__(self, arrays: Mapping[str, Any], parts: Sequence[list[int | None]]) -> None:
        super().__init__(arrays)
        self._parts = parts

    def sequence_ids(self, index: int) -> list[int | None]:
        """The text that each token belongs to: 0 or 1, None for special tokens."""
        return self._parts[index]


class LightTokenizer:
    """`tokenizer.json` without transformers: called as its tokenizers are, for what `planish run` asks of them."""

    def __init__(self, folder: Path, record: TokenizerRecord) -> None:
        from tokenizers import Tokenizer

        try:
            self._core: Any = Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # the library raises nothing more particular
            raise BadInput(f"its tokenizer cannot be loaded: {in_one_line(error)}", where=folder / FILE) from error
        self._lock = threading.Lock()
        self.record = record
        self.model_max_length: float = float("inf") if record.limit is None else record.limit
        self.all_special_ids = record.special_ids

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
    ) -> LightEncoded:
        """The tokens of a text (lists) or of several (arrays)."""
        single = isinstance(texts, str)
        firsts = [texts] if isinstance(texts, str) else list(texts)
        seconds = [pairs] if isinstance(pairs, str) else pairs
        asked = firsts if seconds is None else list(zip(firsts, seconds, strict=True))
        with self._lock:  # another thread's call must not set the core before this one has encoded
            self._set(padding, max_length if truncation else None, max_length if padding == "max_length" else None)
            encodings = self._core.encode_batch(asked)
        attributes = {name: part for name, part in _ATTRIBUTES.items() if name in self.record.inputs}
        attributes |= {"offset_mapping": "offsets"} if return_offsets_mapping else {}
        arrays: dict[str, Any] = {name: [getattr(e, part) for e in encodings] for name, part in attributes.items()}
        if return_tensors is not None:
            arrays = {name: np.array(rows, np.int64) for name, rows in arrays.items()}
        elif single:
            arrays = {name: rows[0] for name, rows in arrays.items()}
        return LightEncoded(arrays, [list(encoding.sequence_ids) for encoding in encodings])

    def _set(self, padding: bool | str, longest: int | None, length: int | None) -> None:
        """Cut at ``longest`` tokens, and pad to ``length`` or else to the longest text."""
        record = self.record
        if longest is not None:
            self._core.enable_truncation(longest, direction=record.truncation_side)
        else:
            self._core.no_truncation()
        if padding:
            self._core.enable_padding(
                length=length, direction=record.padding_side, pad_id=record.pad_id,
                pad_type_id=record.pad_type_id, pad_token=record.pad_token,
            )  # fmt: skip
        else:
            self._core.no_padding()


def light_record(tokenizer: Any, folder: Path) -> TokenizerRecord | None:
    """The settings with which `LightTokenizer` does what ``tokenizer`` of transformers does; None if it does not."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or not (folder / FILE).is_file() or tokenizer.pad_token is None:
        return None
    endless = tokenizer.model_max_length >= ENDLESS
    record = TokenizerRecord(
        inputs=list(tokenizer.model_input_names),
        limit=None if endless else int(tokenizer.model_max_length),
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=str(tokenizer.pad_token),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        special_ids=list(tokenizer.all_special_ids),
    )
    light = LightTokenizer(folder, record)
    if not set(record.inputs) <= _ATTRIBUTES.keys() or _configuration(light._core) != _configuration(core):
        return None
    return record if all(_encode_alike(light, tokenizer, pairs) for pairs in (None, _PAIR)) else None


def _configuration(core: Any) -> Any:
    """The configuration of a core without padding and truncation, which each call sets."""
    return {n: part for n, part in parse_json(core.to_str(), FILE).items() if n not in ("padding", "truncation")}


def _encode_alike(light: LightTokenizer, tokenizer: Any, pair: str | None) -> bool:
    """True if both give the same arrays for texts that show how tokenizers differ."""
    pairs = () if pair is None else ([pair] * len(_PROBES),)
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 16, "return_tensors": "np"}
    encoded, expected = (encoder(list(_PROBES), *pairs, **options) for encoder in (light, tokenizer))
    return set(encoded) == set(expected) and all(np.array_equal(encoded[name], expected[name]) for name in encoded)


def encode(tokenizer: Any, folder: Path, *texts: Any, **options: Any) -> Any:
    """The tokens of a text or several, as the tokenizer in ``folder`` gives them; threads may share a tokenizer.

    BadInput if it cannot: the library raises bare exceptions of its own, say for a vocabulary without the token that
    stands for unknown words.
    """
    try:
        with nullcontext() if isinstance(tokenizer, LightTokenizer) else _TRANSFORMERS_LOCK:
            return tokenizer(*texts, **options)
    except Exception as error:
        raise BadInput(f"its tokenizer cannot read this text ({in_one_line(error)})", where=folder) from error


def length_limit(tokenizer: Any, folder: Path) -> float:
    """Most tokens of one text by the tokenizer's own files; BadInput if they say something else than a number."""
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise BadInput(f"model_max_length is {limit!r}", where=folder / "tokenizer_config.json")
    return limit
