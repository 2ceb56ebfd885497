"""Answers token by token: how the original goes on after a prompt, with its own cache, and whether an engine does too.

The original's tokens are fed to both, so that one early difference does not hide what comes later. In the middle the
rows of the batch change places, as they do in beam search.

=======  =============================================================================================
kl       mean Kullback-Leibler divergence of the engine's next token from the original's, in nats
top1     share of steps at which the likeliest token is the same
greedy   share of steps before the first at which it is not, mean over the texts: 1 if none ever diverges
=======  =============================================================================================

Where the original itself holds two tokens to be equally likely, up to rounding, either of them is the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planish.optimizer.fidelity.metrics import Comparison, log_probabilities
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation

_ROUNDING = 2.0**-16
"""Scores that differ by less than this, relative to the largest, are equal: what exact rewrites may move them by."""


def compare_continuations(pairs: Iterable[tuple[GreedyContinuation, np.ndarray]]) -> Comparison:
    """Metrics over all steps of all texts; the output is called `next token`."""
    found = list(pairs)
    wanted = [log_probabilities(continuation.scores) for continuation, _ in found]
    given = [log_probabilities(scores) for _, scores in found]
    agreeing = [_agree(continuation.scores, scores) for continuation, scores in found]
    divergences = [(np.exp(one) * (one - other)).sum(-1) for one, other in zip(wanted, given, strict=True)]
    before = [np.cumprod(same, axis=0).mean(axis=0) for same in agreeing]
    kl = float(np.concatenate([d.reshape(-1) for d in divergences]).mean())
    return Comparison(
        {
            "next token": {
                "kl": max(kl, 0.0) if np.isfinite(kl) else np.inf,
                "top1": float(np.concatenate([same.reshape(-1) for same in agreeing]).mean()),
                "greedy": float(np.concatenate(before).mean()),
            }
        }
    )


def _agree(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Whether the engine's best token is a best one of the original's, up to rounding of its scores; shape without
    the vocabulary."""
    chosen = np.take_along_axis(wanted, given.argmax(-1)[..., None], axis=-1)[..., 0]
    rounding = _ROUNDING * np.abs(wanted).max(axis=-1)
    return np.asarray(chosen >= wanted.max(axis=-1) - rounding)
