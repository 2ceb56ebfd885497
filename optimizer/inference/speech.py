"""Transcription of recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.requests import read_rows, stacked
from planish.optimizer.inference.task import Answer
from planish.optimizer.inference.text_generation import TextGenerator


@dataclass(kw_only=True)
class SpeechTranscriber(TextGenerator):
    """An encoder-decoder whose prompts are spectra, and which may be without a tokenizer."""

    @property
    def array_names(self) -> tuple[str, ...]:
        """The inputs of the encoder."""
        return tuple(tensor.name for tensor in self.signature.inputs)

    def requests(self, path: Path) -> Iterator[Any]:
        """The recordings of a file."""
        return read_rows(path, self.signature)

    def answer(self, requests: Sequence[Any]) -> list[Answer]:
        """The text of each recording, or its tokens up to the one that ends it where there is no tokenizer."""
        rows: list[np.ndarray] = []
        for batch in self.limits.groups(requests):
            steps = list(self.generate(stacked(self.limits.filled(batch))))
            rows += list(np.stack(steps, axis=1)[: len(batch)])
        if self.tokenizer is None:
            return [{"tokens": [int(token) for token in self.until_end(row)]} for row in rows]
        return [{"text": self.decode(row)} for row in rows]

    def default_length(self) -> int:
        """As many tokens as there is room for: a recording is transcribed to its end."""
        return self.longest or super().default_length()

    def forced_tokens(self) -> list[list[int]]:
        """Tokens that the answer begins with, several where the engine chooses: language, task, no timestamps."""
        return forced_tokens(self.settings)


def forced_tokens(settings: Mapping[str, Any]) -> list[list[int]]:
    """Tokens that `generation_config.json` allows at each place behind the start token, as in Whisper's `generate`.

    The engine chooses a language that is not given among those that the model has. Timestamps are never asked for.
    BadInput if the given language or task is not one of the model's.
    """
    languages, tasks = settings.get("lang_to_id", {}), settings.get("task_to_id", {})
    language, task = settings.get("language"), settings.get("task")
    forced = [] if language or task else [[token] for _, token in settings.get("forced_decoder_ids", [])]
    allowed = [[_token_of(_language_token(language), languages, "language")]] if language else forced[:1]
    if languages and allowed in ([], [[None]]):
        allowed = [sorted(languages.values())]
    task = task or ("transcribe" if language and tasks else None)
    allowed += [[_token_of(task, tasks, "task")]] if task else forced[1:]
    no_timestamps = settings.get("no_timestamps_token_id")
    allowed += [[no_timestamps]] if no_timestamps is not None and allowed[-1:] != [[no_timestamps]] else []
    return [tokens for tokens in allowed if tokens != [None]]


def _token_of(name: str, table: Mapping[str, int], kind: str) -> int:
    if name not in table:
        raise BadInput(
            f"generation_config.json asks for the {kind} {name!r}, which is not among its {', '.join(table) or 'none'}"
        )
    return int(table[name])


def _language_token(name: str) -> str:
    """`<|en|>` of `english`, `en` or `<|en|>`."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return name if name.startswith("<|") else f"<|{TO_LANGUAGE_CODE.get(name.lower(), name.lower())}|>"
