"""Transcription of recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.text_generation import TextGenerator
from planish.optimizer.inference.vision import read_rows, stacked
from planish.optimizer.ir.program import Signature


@dataclass
class SpeechTranscriber(TextGenerator):
    """A writer that hears: its prompts are spectra, and it may be without a tokenizer."""

    signature: Signature = field(default_factory=lambda: Signature((), ()))
    """Of the encoder."""

    def answer(self, questions: Sequence[Any]) -> list[dict[str, Any]]:
        """The text of each recording, or its tokens up to the one that ends it where there is no tokenizer."""
        groups = [(group, stacked(self.room.filled(group))) for group in self.room.groups(questions)]
        tokens = [row for g, a in groups for row in np.stack(list(self.continued(a)), axis=1)[: len(g)]]
        if self.tokenizer is None:
            return [{"tokens": [int(token) for token in self.before_end(row)]} for row in tokens]
        return [{"text": self.decode(row)} for row in tokens]

    def questions(self, path: Path) -> Iterator[Any]:
        """The recordings of a file."""
        return read_rows(path, self.signature)

    def usual(self) -> int:
        """As many tokens as there is room for: what is said is to be written to its end."""
        return self.longest or super().usual()

    def opening(self) -> list[list[int]]:
        """Tokens that the answer begins with, several where the engine chooses: language, task, no timestamps."""
        return opening(self.settings)


def transcriber(writer: TextGenerator, signature: Signature) -> SpeechTranscriber:
    """A writer whose encoder has a signature of spectra."""
    own = {part.name: getattr(writer, part.name) for part in fields(writer)}
    return SpeechTranscriber(**own, signature=signature)


def opening(settings: Mapping[str, Any]) -> list[list[int]]:
    """What `generation_config.json` prescribes for each place after the start token, as Whisper's own `generate` does.

    A language that is not said is chosen among those that the model knows. Timestamps are never asked for. BadInput if
    the language or the task that is said is not among those that are known.
    """
    languages, tasks = settings.get("lang_to_id", {}), settings.get("task_to_id", {})
    said, task = settings.get("language"), settings.get("task")
    forced = [] if said or task else [[token] for _, token in settings.get("forced_decoder_ids", [])]
    wanted = [[_known(languages, _language_token(said), "language")]] if said else forced[:1]
    if languages and wanted in ([], [[None]]):
        wanted = [sorted(languages.values())]
    chosen = task or ("transcribe" if said and tasks else None)
    wanted += [[_known(tasks, chosen, "task")]] if chosen else forced[1:]
    silent = settings.get("no_timestamps_token_id")
    wanted += [[silent]] if silent is not None and wanted[-1:] != [[silent]] else []
    return [tokens for tokens in wanted if tokens != [None]]


def _known(table: Mapping[str, int], name: str, what: str) -> int:
    if name not in table:
        raise BadInput(
            f"generation_config.json asks for the {what} {name!r}, which is not among its {', '.join(table) or 'none'}"
        )
    return int(table[name])


def _language_token(name: str) -> str:
    """`<|en|>` of `english`, `en` or `<|en|>`."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return name if name.startswith("<|") else f"<|{TO_LANGUAGE_CODE.get(name.lower(), name.lower())}|>"
