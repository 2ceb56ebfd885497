"""Texts that an engine writes: continuations of a prompt, translations, summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planish.optimizer.errors import BadInput, first_fault, in_one_line
from planish.optimizer.inference.answer_options import TaskOption
from planish.optimizer.inference.requests import read_texts
from planish.optimizer.inference.task import Answer, OpenedFolder, Task
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Arrays, Signature
from planish.optimizer.runtime.batching import BatchLimits
from planish.optimizer.runtime.generation import Decoding
from planish.optimizer.runtime.tokenization import encode
from planish.optimizer.system.json_files import read_object

DEFAULT_LENGTH = 64
"""New tokens when nothing else is asked for."""


@dataclass(kw_only=True)
class TextGenerator(Task):
    """Opened components with their tokenizer and the checkpoint's settings for generation.

    ``longest`` counts the tokens of prompt and answer together (of each of them, for an encoder-decoder).
    """

    decoding: Decoding
    tokenizer: Any
    signature: Signature
    """Of the component that reads the prompt."""
    settings: Mapping[str, Any]
    """`generation_config.json`, on top of `config.json`."""

    @classmethod
    def open(cls, folder: OpenedFolder) -> Self:
        """A program whose decoder has a cache."""
        place = folder.folder
        settings = read_settings(place / "config.json") | read_settings(place / "generation_config.json")
        lengths = [signature.axes["sequence"] for signature in folder.signatures if "sequence" in signature.axes]
        components = [] if folder.manifest is None else folder.manifest.signatures
        return cls(
            name=folder.task,
            folder=place,
            longest=lengths[0].maximum if lengths else None,
            decoding=Decoding.of(registry.backend(folder.target), place, components),
            tokenizer=folder.tokenizer,
            signature=folder.signatures[0],
            settings=settings,
        )

    @property
    def options(self) -> frozenset[TaskOption]:
        """Those of sampling and length."""
        return frozenset({TaskOption.GENERATION})

    @property
    def notes(self) -> tuple[str, ...]:
        """The settings of the checkpoint that have no effect here."""
        if self.settings.get("num_beams", 1) == 1:
            return ()
        return ("generation_config.json asks for beam search, which is not done here",)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer: asked for by the user, else by the checkpoint, else the default."""
        return self.asked.max_new_tokens or int(self.settings.get("max_new_tokens") or self.default_length())

    @property
    def limits(self) -> BatchLimits:
        """The number of prompts that run together; their lengths are not padded to a size of the engine."""
        return BatchLimits(BatchLimits.of(self.signature).texts)

    @property
    def is_encoder_decoder(self) -> bool:
        """True if the answer is a text of its own instead of the prompt's continuation."""
        return bool(self.settings.get("is_encoder_decoder"))

    def requests(self, path: Path) -> Iterator[Any]:
        """The prompts of a file."""
        return read_texts(path)

    def answer(self, requests: Sequence[Any]) -> list[Answer]:
        """The text written for each prompt; as many as the engine takes at once run as one padded batch."""
        batches = self.limits.groups([request.text for request in requests])
        return [{"text": self.decode(row)} for texts in batches for row in np.stack(list(self.tokens(texts)), axis=1)]

    def stream(self, text: str) -> Iterator[str]:
        """The parts of the text, each as soon as no later token can change it; the last one ends its line."""
        import torch
        from transformers import TextStreamer

        parts: list[str] = []
        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True)
        streamer.on_finalized_text = lambda part, stream_end=False: parts.append(part + "\n" * stream_end)
        for tokens in self.tokens([text]):
            streamer.put(torch.from_numpy(tokens))
            yield from parts
            parts.clear()
        streamer.end()
        yield from parts

    def tokens(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Tokens step by step, shape (batch,). BadInput if a prompt is empty or leaves no room for an answer."""
        steps = self.generate(self._encode(self.limits.filled(texts)))
        return (tokens[: len(texts)] for tokens in steps)

    def generate(self, prompt: Arrays) -> Iterator[np.ndarray]:
        """Tokens step by step behind a prompt of arrays, those that the answer must begin with among them."""
        first = next(iter(prompt.values()))
        before = 1 if self.is_encoder_decoder else first.shape[1]
        forced = self.forced_tokens()
        most = self.max_new_tokens + len(forced)
        if self.longest is not None:
            most = min(most, self.longest - (0 if self.is_encoder_decoder else before))
        return self.decoding.generate(
            prompt,
            start_tokens=self._start(len(first)),
            most=most,
            ends=self._ends(),
            sampling=self.asked.sampling,
            adjust=self._adjust(before, forced),
        )

    def default_length(self) -> int:
        """New tokens when nothing else is asked for, by the user or the checkpoint."""
        return DEFAULT_LENGTH

    def forced_tokens(self) -> list[list[int]]:
        """The tokens of which each of the answer's first must be one; texts begin as the scores say."""
        return []

    def _encode(self, texts: Sequence[str]) -> Arrays:
        self.tokenizer.padding_side = "right" if self.is_encoder_decoder else "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        encoded = encode(self.tokenizer, self.folder, list(texts), padding=len(texts) > 1, return_tensors="np")
        longest = encoded["input_ids"].shape[1]
        if not min(np.asarray(encoded["attention_mask"]).sum(axis=1), default=0):
            raise BadInput("the prompt is empty", advice="give a text of at least one token")
        if self.longest is not None and longest > self.longest - (not self.is_encoder_decoder):
            raise BadInput(
                f"the prompt has {longest} tokens, the model takes {self.longest}", advice="shorten the prompt"
            )
        return {name: np.asarray(encoded[name], np.int64) for name in ("input_ids", "attention_mask")}

    def _start(self, count: int) -> np.ndarray | None:
        first = self.settings.get("decoder_start_token_id", self.settings.get("bos_token_id"))
        return np.full((count, 1), first, np.int64) if self.is_encoder_decoder else None

    def _ends(self) -> frozenset[int]:
        end = self.settings.get("eos_token_id")
        return frozenset(end if isinstance(end, list) else [] if end is None else [end])

    def decode(self, tokens: np.ndarray) -> str:
        """The text of one row of tokens, up to the one that ends it."""
        return str(self.tokenizer.decode(self.until_end(tokens), skip_special_tokens=True))

    def until_end(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens of one row before the first that ends it."""
        ends = np.flatnonzero(np.isin(tokens, list(self._ends())))
        return tokens[: ends[0]] if len(ends) else tokens

    def _adjust(
        self, before: int, forced: Sequence[Sequence[int]]
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """A function that changes scores before a token is chosen, by the checkpoint's settings; None for none.

        The processors are those of transformers. The first tokens are the likeliest of those that they must be;
        ``before`` tokens stand in front of them.
        """
        import torch

        try:
            score_processors = processors(self.settings, self.max_new_tokens, before + len(forced))
        except (ValueError, TypeError) as error:
            raise self._refused(error) from error
        if not score_processors and not forced:
            return None

        def adjust(tokens: np.ndarray, scores: np.ndarray) -> np.ndarray:
            place = tokens.shape[1] - before
            try:
                if place < len(forced):
                    return best_of(scores, forced[place])
                adjusted = torch.from_numpy(np.array(scores))
                for processor in score_processors:
                    adjusted = processor(torch.from_numpy(np.array(tokens)), adjusted)
            except (IndexError, RuntimeError, ValueError) as error:  # a token that the vocabulary does not have
                raise self._refused(error) from error
            return np.asarray(adjusted.numpy())

        return adjust

    def _refused(self, error: Exception) -> BadInput:
        fault = f"what it says of scores cannot be done ({in_one_line(error)})"
        return BadInput(fault, where=self.folder / "generation_config.json")


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


class _Settings(BaseModel):
    """The settings read from `config.json` and `generation_config.json`; one of another type is BadInput."""

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
