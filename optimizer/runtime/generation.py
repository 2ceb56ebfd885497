"""The decode loop over any engines: one token at a time behind a cache that stays with the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from annotated_types import Ge, Gt, Le

from planish.optimizer.errors import BadInput
from planish.optimizer.interfaces.backend import Backend, Engine
from planish.optimizer.ir.program import Arrays

DECODER = "model"
ENCODER, FIRST, NEXT = "encoder_model", "decoder_model", "decoder_with_past_model"
"""Components of an encoder-decoder."""


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token by its scores: the best one if ``temperature`` is 0, else one drawn at random."""

    temperature: Annotated[float, Ge(0)] = 0.0
    top_k: Annotated[int, Ge(0)] = 0
    """Choose among this many of the best; 0: among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Choose among the fewest of the best whose probabilities reach this sum (Holtzman et al. 2020, section 3.1)."""
    seed: int = 0

    def chooser(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function from scores (batch, vocabulary) to tokens (batch,)."""
        generator = np.random.default_rng(self.seed)
        if not self.temperature:
            return lambda scores: np.asarray(scores.argmax(axis=-1))
        return lambda scores: np.array([self._draw(row, generator) for row in scores])

    def _draw(self, scores: np.ndarray, generator: np.random.Generator) -> int:
        order = np.argsort(-scores, kind="stable")[: self.top_k or None]
        logits = scores[order].astype(np.float64) / self.temperature
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        kept = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
        return int(generator.choice(order[:kept], p=probabilities[:kept] / probabilities[:kept].sum()))


class Decoding:
    """Texts that are being continued together, one token a step.

    ``start`` takes the prompt: ``input_ids`` and ``attention_mask`` of shape (batch, tokens), padded on the left for
    a decoder and on the right for an encoder-decoder, whose answers begin with ``start_tokens`` of shape (batch, 1);
    or whatever else its encoder reads, without a mask. Without a mask all tokens count.
    Scores have shape (batch, vocabulary) and are those of the next token.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._decoder_only = DECODER in engines
        self._cache: object = None
        self._mask: np.ndarray | None = None

    @classmethod
    def of(cls, target: Backend, folder: Path, components: Iterable[str]) -> Self:
        """Open the components that lie in an engine folder."""
        return cls({name: target.open(target.path_of(name, folder)) for name in components})

    def start(self, prompt: Arrays, start_tokens: np.ndarray | None = None) -> np.ndarray:
        """Read the prompt and score the first token of the answer."""
        ids = prompt.get("input_ids")
        mask = prompt.get("attention_mask", None if ids is None else np.ones_like(ids))
        self._mask = None if mask is None else np.asarray(mask, np.int64)
        self._cache = None
        if self._decoder_only:
            if ids is None:
                raise BadInput("the prompt has no input_ids, which a decoder goes on with")
            return self._decode_behind_cache(np.asarray(ids, np.int64))
        if start_tokens is None:
            raise BadInput("the decoder of an encoder-decoder needs a token to start with")
        encoded = self._engines[ENCODER].run(prompt)
        states = {"encoder_hidden_states": encoded["last_hidden_state"]}
        return self._decode(FIRST, {"input_ids": np.asarray(start_tokens, np.int64), **states})

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        """Add one token to each text, shape (batch,), and score the next one."""
        column = np.asarray(tokens, np.int64)[:, None]
        if not self._decoder_only:
            return self._decode(NEXT, {"input_ids": column})
        self._mask = np.concatenate([self._prompt_mask(), np.ones_like(column)], axis=1)
        return self._decode_behind_cache(column)

    def select(self, rows: np.ndarray) -> None:
        """Continue these rows of the batch, in this order, as beam search does."""
        engine = self._engines[DECODER if self._decoder_only else NEXT]
        self._cache = engine.select(self._cache, rows)
        self._mask = None if self._mask is None else self._mask[rows]

    def generate(
        self,
        prompt: Arrays,
        *,
        start_tokens: np.ndarray | None = None,
        most: int = 64,
        ends: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        adjust: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Tokens of the answers, step by step, shape (batch,).

        Stops after ``most`` tokens, or when every text has given one of ``ends``; a text that has ended repeats the
        token that ended it. ``adjust`` may change the scores of the next token, given all tokens before it (of the
        prompt, or of the answer of an encoder-decoder).
        """
        choose = (sampling or Sampling()).chooser()
        scores = self.start(prompt, start_tokens)
        written = np.asarray(prompt["input_ids"] if start_tokens is None else start_tokens)
        ended = np.zeros(len(scores), bool)
        for number in range(most):
            tokens = choose(scores if adjust is None else adjust(written, scores))
            last = np.where(ended, written[:, -1], tokens)
            ended |= np.isin(last, list(ends))
            written = np.concatenate([written, last[:, None]], axis=1)
            yield last
            if ended.all() or number == most - 1:
                return
            scores = self.advance(last)

    def _decode_behind_cache(self, ids: np.ndarray) -> np.ndarray:
        """Run a decoder on tokens behind its cache."""
        positions = np.maximum(np.cumsum(self._prompt_mask(), axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": self._prompt_mask(), "position_ids": positions}
        return self._step(self._engines[DECODER], feeds)

    def _decode(self, component: str, feeds: Arrays) -> np.ndarray:
        masked = {} if self._mask is None else {"encoder_attention_mask": self._mask}
        return self._step(self._engines[component], {**feeds, **masked})

    def _prompt_mask(self) -> np.ndarray:
        """The mask of a decoder's prompt and of what follows it; BadInput if the prompt has no tokens."""
        if self._mask is None:
            raise BadInput("the prompt has no input_ids")
        return self._mask

    def _step(self, engine: Engine, feeds: Arrays) -> np.ndarray:
        input_names = {tensor.name for tensor in engine.inputs}
        outputs, self._cache = engine.step({n: a for n, a in feeds.items() if n in input_names}, self._cache)
        return np.asarray(outputs["logits"][:, -1])
