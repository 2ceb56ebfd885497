"""Greedy continuations of prompts, and an engine's scores along them (teacher forcing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.runtime.cases import Case, load_cases, save_cases
from planish.optimizer.runtime.generation import Decoding

CONTINUED = 17
"""Tokens of a continuation: the prefill's, and sixteen behind the cache."""


@dataclass(frozen=True)
class GreedyContinuation:
    """A prompt, and how the original goes on. Rows of the batch are reversed before step ``swap`` (0: never)."""

    prompt: Case
    reorder_at: int
    start: np.ndarray
    """First tokens of an encoder-decoder's answer, shape (batch, 1); of shape (batch, 0) for a decoder."""
    tokens: np.ndarray
    """The original's greedy choice, shape (steps, batch)."""
    scores: np.ndarray
    """The scores that it chose from, shape (steps, batch, vocabulary)."""


def save_continuations(found: Sequence[GreedyContinuation], path: Path) -> None:
    """Write them as one safetensors file."""
    save_cases([_flat(one) for one in found], path)


def load_continuations(path: Path) -> list[GreedyContinuation]:
    """Read them back; BadInput if the file is missing or broken."""
    found = []
    for case in load_cases(path):
        ranks = {name: case[name].ndim for name in ("swap", "start", "tokens", "scores") if name in case}
        whole = ranks == {"swap": 0, "start": 2, "tokens": 2, "scores": 3}
        if not whole or case["scores"].shape[:2] != case["tokens"].shape or not case["scores"].size:
            raise BadInput("this holds no continuations of prompts", where=path, advice="build it again")
        prompt = {name.partition(":")[2]: array for name, array in case.items() if name.startswith("prompt:")}
        found.append(
            GreedyContinuation(prompt, int(case["swap"].item()), case["start"], case["tokens"], case["scores"])
        )
    return found


def _flat(one: GreedyContinuation) -> Mapping[str, np.ndarray]:
    prompt = {f"prompt:{name}": array for name, array in one.prompt.items()}
    return {**prompt, "swap": np.array(one.reorder_at), "start": one.start, "tokens": one.tokens, "scores": one.scores}


Prompt = tuple[Case, int]
"""Arrays of a prompt, and the step before which its rows are reversed (0: never)."""


def rows_at(step: int, reorder_at: int, count: int) -> np.ndarray:
    """Order in which the rows of the step before are read."""
    rows = np.arange(count)
    return rows[::-1].copy() if step == reorder_at else rows


def score_teacher_forced(decoding: Decoding, wanted: GreedyContinuation) -> np.ndarray:
    """Scores of an engine that is fed the original's tokens, shape as `GreedyContinuation.scores`."""
    scores = [decoding.start(wanted.prompt, wanted.start if wanted.start.size else None)]
    for step in range(1, len(wanted.tokens)):
        rows = rows_at(step, wanted.reorder_at, wanted.tokens.shape[1])
        if step == wanted.reorder_at:
            decoding.select(rows)
        scores.append(decoding.advance(wanted.tokens[step - 1][rows]))
    return np.stack(scores)
