"""Metrics of generation: the original's greedy continuation of a prompt, compared step by step (teacher forcing).

Engine and original get the original's tokens, so that an early difference does not hide later ones. In the middle, the
rows of the batch are reordered, as in beam search.

======= ============================================================================================= kl mean
Kullback-Leibler divergence of the engine's next token from the original's, in nats top1 share of steps at which the
most likely token is the same greedy share of steps before the first different token, mean over the texts: 1 if none
differs ======= =============================================================================================

If the original's scores of two tokens are equal up to rounding errors, both count as its best token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planish.optimizer.fidelity.metrics import Comparison, log_probabilities
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation

_ROUNDING = 2.0**-16
"""Relative score difference below which scores are equal; exact rewrites may change scores by this much."""


def compare_continuations(pairs: Iterable[tuple[GreedyContinuation, np.ndarray]]) -> Comparison:
    """Metrics over all steps of all texts; the output is named `next token`."""
    continuations = list(pairs)
    expected = [log_probabilities(continuation.scores) for continuation, _ in continuations]
    actual = [log_probabilities(scores) for _, scores in continuations]
    agreeing = [_agree(continuation.scores, scores) for continuation, scores in continuations]
    divergences = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(expected, actual, strict=True)]
    before = [np.cumprod(same, axis=0).mean(axis=0) for same in agreeing]
    kl = float(np.concatenate([d.reshape(-1) for d in divergences]).mean())
    return Comparison(
        {
            "next token": {
                # Rounding errors can give a small negative value.
                "kl": max(kl, 0.0) if np.isfinite(kl) else np.inf,
                "top1": float(np.concatenate([same.reshape(-1) for same in agreeing]).mean()),
                "greedy": float(np.concatenate(before).mean()),
            }
        }
    )


def _agree(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """True where the engine's best token is a best token of the original up to rounding errors; shape without
    vocabulary."""
    chosen = np.take_along_axis(wanted, given.argmax(-1)[..., None], axis=-1)[..., 0]
    rounding = _ROUNDING * np.abs(wanted).max(axis=-1)
    return np.asarray(chosen >= wanted.max(axis=-1) - rounding)
