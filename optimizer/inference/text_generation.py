"""Texts that an engine writes: continuations of a prompt, translations, summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planish.optimizer.errors import BadInput, first_fault, in_one_line
from planish.optimizer.inference.requests import read_questions
from planish.optimizer.ir.program import Arrays
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.batching import BatchLimits
from planish.optimizer.runtime.generation import Decoding, Sampling
from planish.optimizer.runtime.tokenization import encode
from planish.optimizer.system.json_files import read_object

MOST = 64
"""New tokens when nothing else is asked for."""


class Prompted(Protocol):
    """Anything that asks with a text."""

    @property
    def text(self) -> str:
        """The prompt."""


@dataclass
class TextGenerator:
    """Opened components with their tokenizer and the checkpoint's settings for generation."""

    decoding: Decoding
    tokenizer: Any
    task: str
    folder: Path
    settings: Mapping[str, Any]
    """`generation_config.json`, on top of `config.json`."""
    longest: int | None
    """Most tokens of prompt and answer together (of each of them, for an encoder-decoder)."""
    most: int = MOST
    sampling: Sampling = field(default_factory=Sampling)
    room: BatchLimits = field(default_factory=BatchLimits)

    @property
    def answers(self) -> bool:
        """Whether the answer is a text of its own (encoder-decoder) instead of the prompt's continuation."""
        return bool(self.settings.get("is_encoder_decoder"))

    def answer(self, questions: Sequence[Prompted]) -> list[dict[str, Any]]:
        """The text written for each prompt; as many as the engine takes at once run as one padded batch."""
        groups = self.room.groups([question.text for question in questions])
        return [{"text": self.decode(row)} for group in groups for row in np.stack(list(self.tokens(group)), axis=1)]

    def questions(self, path: Path) -> Iterator[Any]:
        """The prompts of a file."""
        return read_questions(path)

    def tokens(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Tokens step by step, shape (batch,). BadInput if a prompt is empty or leaves no room for an answer."""
        steps = self.continued(self._encode(self.room.filled(texts)))
        return (tokens[: len(texts)] for tokens in steps)

    def continued(self, prompt: Arrays) -> Iterator[np.ndarray]:
        """Tokens step by step behind a prompt of arrays, those that the answer must begin with among them."""
        first = next(iter(prompt.values()))
        before = 1 if self.answers else first.shape[1]
        forced = self.opening()
        room = None if self.longest is None else self.longest - (0 if self.answers else before)
        most = self.most + len(forced)
        return self.decoding.generate(
            prompt,
            start_tokens=self._start(len(first)),
            most=most if room is None else min(most, room),
            ends=self._ends(),
            sampling=self.sampling,
            adjust=self._adjust(before, forced),
        )

    def usual(self) -> int:
        """New tokens when nothing else is asked for, by the user or the checkpoint."""
        return MOST

    def opening(self) -> list[list[int]]:
        """The tokens of which each of the answer's first must be one; texts begin as the scores say."""
        return []

    def _encode(self, texts: Sequence[str]) -> Arrays:
        self.tokenizer.padding_side = "right" if self.answers else "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        encoded = encode(self.tokenizer, self.folder, list(texts), padding=len(texts) > 1, return_tensors="np")
        longest = encoded["input_ids"].shape[1]
        if not min(np.asarray(encoded["attention_mask"]).sum(axis=1), default=0):
            raise BadInput("the prompt is empty", advice="give a text of at least one token")
        if self.longest is not None and longest > self.longest - (not self.answers):
            raise BadInput(
                f"the prompt has {longest} tokens, the model takes {self.longest}", advice="shorten the prompt"
            )
        return {name: np.asarray(encoded[name], np.int64) for name in ("input_ids", "attention_mask")}

    def _start(self, count: int) -> np.ndarray | None:
        first = self.settings.get("decoder_start_token_id", self.settings.get("bos_token_id"))
        return np.full((count, 1), first, np.int64) if self.answers else None

    def _ends(self) -> frozenset[int]:
        end = self.settings.get("eos_token_id")
        return frozenset(end if isinstance(end, list) else [] if end is None else [end])

    def decode(self, tokens: np.ndarray) -> str:
        """The text of one row of tokens, up to the one that ends it."""
        return str(self.tokenizer.decode(self.before_end(tokens), skip_special_tokens=True))

    def before_end(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens of one row before the first that ends it."""
        ends = np.flatnonzero(np.isin(tokens, list(self._ends())))
        return tokens[: ends[0]] if len(ends) else tokens

    def _adjust(
        self, before: int, forced: Sequence[Sequence[int]]
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """What the checkpoint's settings do to scores before a token is chosen, by the processors of transformers.

        The first tokens are the likeliest of those that they must be; ``before`` tokens stand in front of them.
        """
        import torch

        try:
            found = processors(self.settings, self.most, before + len(forced))
        except (ValueError, TypeError) as error:
            raise self._refused(error) from error
        if not found and not forced:
            return None

        def adjust(tokens: np.ndarray, scores: np.ndarray) -> np.ndarray:
            place = tokens.shape[1] - before
            try:
                if place < len(forced):
                    return best_of(scores, forced[place])
                adjusted = torch.from_numpy(np.array(scores))
                for processor in found:
                    adjusted = processor(torch.from_numpy(np.array(tokens)), adjusted)
            except (IndexError, RuntimeError, ValueError) as error:  # a token that the vocabulary does not have
                raise self._refused(error) from error
            return np.asarray(adjusted.numpy())

        return adjust

    def _refused(self, error: Exception) -> BadInput:
        what = f"what it says of scores cannot be done ({in_one_line(error)})"
        return BadInput(what, where=self.folder / "generation_config.json")


def best_of(scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Scores (batch, vocabulary) that leave nothing to choose: the likeliest of ``tokens`` alone is above -infinity."""
    likeliest = np.asarray(tokens)[scores[:, list(tokens)].argmax(axis=1)]
    alone = np.full_like(scores, -np.inf)
    alone[np.arange(len(scores)), likeliest] = 0
    return alone


def processors(settings: Mapping[str, Any], most: int, begin: int) -> list[Any]:
    """The processors of scores that a generation configuration asks for; ``begin`` tokens stand before the first."""
    from transformers.generation import logits_process as library

    makers: Mapping[str, Callable[[Any], Any]] = {
        "repetition_penalty": library.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": library.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: library.NoBadWordsLogitsProcessor(words, settings.get("eos_token_id")),
        "min_length": lambda least: library.MinLengthLogitsProcessor(least, settings["eos_token_id"]),
        "forced_bos_token_id": library.ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda end: library.ForcedEOSTokenLogitsProcessor(begin + most, end),
        "suppress_tokens": library.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda tokens: library.SuppressTokensAtBeginLogitsProcessor(tokens, begin),
    }
    idle: Mapping[str, object] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
    if settings.get("eos_token_id") is None:  # no end that could come too early
        settings = {name: value for name, value in settings.items() if name != "min_length"}
    return [
        make(settings[name]) for name, make in makers.items() if settings.get(name) not in (None, [], idle.get(name))
    ]


def open_writer(folder: Path, target: str, manifest: Manifest, tokenizer: Any) -> TextGenerator:
    """Open an engine folder of a program that generates."""
    from planish.optimizer.interfaces import registry

    settings = read_settings(folder / "config.json") | read_settings(folder / "generation_config.json")
    signatures = [record.signature() for record in manifest.signatures.values()]
    lengths = [signature.axes["sequence"] for signature in signatures if "sequence" in signature.axes]
    decoding = Decoding.of(registry.backend(target), folder, manifest.signatures)
    longest = lengths[0].maximum if lengths else None
    room = BatchLimits(BatchLimits.of(signatures[0]).texts)
    return TextGenerator(decoding, tokenizer, manifest.task, folder, settings, longest, room=room)


def with_options(writer: TextGenerator, most: int | None, sampling: Sampling) -> TextGenerator:
    """The writer with what was asked for."""
    return replace(writer, most=most or int(writer.settings.get("max_new_tokens") or writer.usual()), sampling=sampling)


class _Settings(BaseModel):
    """What is read of `config.json` and `generation_config.json`: by its type here, or BadInput."""

    model_config = ConfigDict(strict=True, extra="ignore")
    begin_suppress_tokens: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_decoder_ids: list[Annotated[list[int | None], Field(min_length=2, max_length=2)]] | None = None
    forced_eos_token_id: int | list[int] | None = None
    is_encoder_decoder: bool | None = None
    lang_to_id: dict[str, int] | None = None
    language: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    min_length: int | None = None
    no_repeat_ngram_size: int | None = None
    no_timestamps_token_id: int | None = None
    num_beams: int | None = None
    repetition_penalty: float | None = None
    suppress_tokens: list[int] | None = None
    task: str | None = None
    task_to_id: dict[str, int] | None = None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings for generation in a file, without those that say nothing; none if there is no file.

    BadInput if one is of another type than transformers writes.
    """
    if not path.is_file():
        return {}
    try:
        return _Settings.model_validate(read_object(path)).model_dump(exclude_none=True)
    except ValidationError as error:
        raise BadInput(first_fault(error), where=path) from None
