"""Metrics of the difference between outputs and reference.

Computed over all cases, at positions that are not padding:

==========  ==========================================================================================
max_abs     largest absolute difference
max_rel     largest absolute difference, divided by the largest magnitude of the reference output
cosine      mean cosine similarity of the vectors along the last axis
cosine_min  smallest such cosine
top1        share of vectors with the same arg max (logits only)
perplexity  of the next tokens of the inputs, as a multiple of the original's (decoders only)
kl, greedy  of continuations, see `fidelity/generation_metrics.py`
score       printed by a user's command, see `fidelity/user_metric.py`; as a multiple of the plain engine's it
            is score_ratio, in a budget `score>=0.98x`
==========  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planish.optimizer.ir.program import SUM, Role, Signature, TensorSpec
from planish.optimizer.runtime.cases import BEST, NEXT, Case, log_likelihoods

METRICS = ("max_abs", "max_rel", "cosine", "cosine_min", "top1", "perplexity", "kl", "greedy", "score")
ERRORS = ("max_abs", "max_rel", "perplexity", "kl")
"""Metrics of which lower is better."""
CONTINUED = ("kl", "greedy", "top1")
"""Metrics of continuations."""
JUDGED = ("score", "score_ratio")
"""Metrics of the user's command."""
CACHE = "cache"
"""Common name of all cache tensors in a comparison."""
MULTIPLES = ("perplexity", "score_ratio")
"""Metrics that are ratios to the original's value."""
_BLOCK = 1 << 16
"""Elements per block of a comparison, so that it stays in the processor's cache."""
_ABSURD = 1e20
"""Magnitude from which values stand for minus infinity in masked scores; they do not count for the scale of an
output."""


@dataclass(frozen=True)
class Comparison:
    """Metrics by output name. ``top1`` exists only for vectors of scores."""

    outputs: Mapping[str, Mapping[str, float]]

    def worst(self, metric: str) -> float | None:
        """The worst value of ``metric`` over the outputs that have it."""
        values = [metrics[metric] for metrics in self.outputs.values() if metric in metrics]
        return None if not values else (max(values) if metric in ERRORS else min(values))

    def rounded(self, digits: int = 3) -> Comparison:
        """The comparison with a few significant digits, for tables and manifests."""
        return Comparison(
            {
                name: {metric: _round(metric, value, digits) for metric, value in metrics.items()}
                for name, metrics in self.outputs.items()
            }
        )


def _round(metric: str, value: float, digits: int) -> float:
    if not math.isfinite(value):
        return value
    if metric in ERRORS and metric != "perplexity":
        return float(f"{value:.{digits - 1}e}")
    # Rounded as a distance from 1: 0.9999871 keeps its significant digits as 1 - 1.29e-05.
    return 1.0 - float(f"{1.0 - value:.{digits - 1}e}")


def relation_of(metric: str) -> str:
    """Relation of a budget on a metric: upper bounds for errors, lower bounds for similarities."""
    return "<=" if metric in ERRORS else ">="


def compare(
    signature: Signature, inputs: Sequence[Case], expected: Sequence[Case], actual: Iterable[Case]
) -> Comparison:
    """Compare the outputs of several cases; every sequence has one entry per case, arrays by name.

    One case of ``actual`` is in memory at a time. ValueError if an output is missing or has an unexpected shape.
    """
    tallies = {tensor.name: _Tally(tensor) for tensor in signature.outputs if tensor.name in expected[0]}
    for feeds, wanted, got in zip(inputs, expected, actual, strict=True):
        for name, tally in tallies.items():
            if name not in got:
                raise ValueError(f"output {name!r} is missing")
            visible = visible_part(signature, tally.tensor, feeds, wanted[name])
            tally.add(wanted, got, visible)
            if signature.cached and tally.tensor.role is Role.LOGITS:
                tally.read_on(feeds.get("input_ids"), wanted, got, visible)
    return Comparison(_joined({name: (tally.tensor, tally.metrics()) for name, tally in tallies.items()}))


def _joined(by_output: Mapping[str, tuple[TensorSpec, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Metrics by output; the tensors of a cache (two per layer) are combined by the worst value of each metric."""
    parts = Comparison({name: metrics for name, (tensor, metrics) in by_output.items() if tensor.role is Role.CACHE})
    rest = {name: metrics for name, (tensor, metrics) in by_output.items() if tensor.role is not Role.CACHE}
    worst = {metric: parts.worst(metric) for metric in METRICS}
    cache = {metric: value for metric, value in worst.items() if value is not None}
    return rest | ({CACHE: cache} if cache else {})


def visible_part(signature: Signature, tensor: TensorSpec, feeds: Case, wanted: np.ndarray) -> np.ndarray | None:
    """The mask of the valid positions of an output ``wanted`` for the inputs ``feeds``; None if all are valid.

    All positions are valid as well if the actual shape differs from the declared one.
    """
    mask = signature.mask()
    visible = _visible(tensor, mask, None if mask is None else feeds.get(mask.name))
    if visible is None or visible.ndim != wanted.ndim:
        return None
    visible = _end(visible, tensor, wanted)
    fits = all(size in (1, whole) for size, whole in zip(visible.shape, wanted.shape, strict=True))
    return visible if fits else None


def _end(visible: np.ndarray, tensor: TensorSpec, wanted: np.ndarray) -> np.ndarray:
    """The end of a mask that is longer than the output's sequence."""
    axis = tensor.axis_index("sequence")
    if axis is None or visible.shape[axis] <= wanted.shape[axis]:
        return visible
    return visible.take(range(visible.shape[axis] - wanted.shape[axis], visible.shape[axis]), axis)


def _visible(tensor: TensorSpec, mask: TensorSpec | None, counts: np.ndarray | None) -> np.ndarray | None:
    """The valid positions of an output: the mask, broadcast to the output's axes.

    An output of the new tokens (`sequence`) uses the end of a mask over past and new tokens.
    """
    if mask is None or counts is None:
        return None
    along = list(mask.shape)
    if along[-1] not in tensor.shape and "sequence" in tensor.shape and "sequence" in str(along[-1]).split(SUM):
        along[-1] = "sequence"
    places: list[int] = []  # a size that is there twice (attention, a batch as large as its texts) is met in order
    for axis in along:
        free = [place for place, size in enumerate(tensor.shape) if size == axis and place not in places]
        if not free:
            return None
        places.append(free[0])
    shape = [1] * len(tensor.shape)
    for place, count in zip(places, counts.shape, strict=True):
        shape[place] = count
    return np.asarray(np.transpose(counts, np.argsort(places)).reshape(shape) != 0)


class _Tally:
    """Running metrics of one output."""

    def __init__(self, tensor: TensorSpec) -> None:
        self.tensor = tensor
        self.max_abs = 0.0
        self.scale = 0.0
        self.cosines: list[np.ndarray] = []
        self.surprise: list[np.ndarray] = []
        """Log likelihood of each next token under the original minus that under the engine, in nats."""
        self.agreements: list[np.ndarray] = []

    def add(self, wanted_case: Case, got_case: Case, visible: np.ndarray | None) -> None:
        """Add one case."""
        name = self.tensor.name
        expected, actual = wanted_case[name], got_case[name]
        if expected.shape != actual.shape:
            raise ValueError(f"output {self.tensor.name!r} has shape {actual.shape}, expected {expected.shape}")
        if not expected.size:
            return
        width = expected.shape[-1] if expected.ndim else 1
        wanted, got = expected.reshape(-1, width), actual.reshape(-1, width)
        shown = np.broadcast_to(True if visible is None else visible, expected.shape).reshape(-1, width)
        step = max(1, _BLOCK // width)
        best = [case[f"{name}{BEST}"] for case in (wanted_case, got_case) if f"{name}{BEST}" in case]
        scores = self.tensor.role is Role.LOGITS and width > 1
        in_part = scores and len(best) == 2  # their best entries may not be among those that are kept
        for rows in (slice(start, start + step) for start in range(0, len(wanted), step)):
            self._add_rows(
                wanted[rows], got[rows], shown[rows], vectors=expected.ndim > 0, scores=scores and not in_part
            )
        if in_part:
            self.agreements.append((best[0] == best[1]).ravel()[shown.any(axis=-1)])

    def read_on(self, ids: np.ndarray | None, wanted_case: Case, got_case: Case, visible: np.ndarray | None) -> None:
        """Add the log likelihoods of the next tokens, if the output holds scores of the vocabulary at each token."""
        name = self.tensor.name
        expected, actual = wanted_case[name], got_case[name]
        kept = [case[f"{name}{NEXT}"] for case in (wanted_case, got_case) if f"{name}{NEXT}" in case]
        whole = expected.shape[-1] == self.tensor.shape[-1]
        if ids is None or expected.shape[:-1] != ids.shape or not (whole or len(kept) == 2):
            return
        # A token counts if it and the one before are valid: the first token of a text has no prediction.
        both = np.ones(ids[:, 1:].shape, bool)
        if visible is not None:
            valid = np.broadcast_to(visible, expected.shape)[..., 0]
            both = valid[:, 1:] & valid[:, :-1]
        following = ids[:, 1:][both]
        if following.size:
            likelihoods = (
                [log_likelihoods(scores[:, :-1], both, following) for scores in (expected, actual)]
                if whole
                else [each[both] for each in kept]
            )
            self.surprise.append(likelihoods[0] - likelihoods[1])

    def _add_rows(
        self, expected: np.ndarray, actual: np.ndarray, shown: np.ndarray, *, vectors: bool, scores: bool
    ) -> None:
        """Add a block of rows: vectors, or single numbers; of ``scores`` the best ones shall agree."""
        wanted = np.where(shown, expected, 0).astype(np.float64, copy=False)
        got = np.where(shown, actual, 0).astype(np.float64, copy=False)
        same = (wanted == got) | (np.isnan(wanted) & np.isnan(got))  # also equal infinities
        # inf - inf is nan, which counts as an infinite difference below.
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(wanted - got))
        self.max_abs = max(self.max_abs, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        ordinary = np.abs(wanted[np.isfinite(wanted) & (np.abs(wanted) < _ABSURD)])
        self.scale = max(self.scale, float(ordinary.max(initial=0.0)))
        if vectors:
            self._add_vectors(wanted, got, shown, scores=scores)

    def _add_vectors(self, wanted: np.ndarray, got: np.ndarray, shown: np.ndarray, *, scores: bool) -> None:
        kept = shown.any(axis=-1)
        rows = [array[kept] for array in (wanted, got, shown)]
        self.cosines.append(_cosines(rows[0], rows[1]))
        if scores:
            best = [np.where(rows[2], row, -np.inf).argmax(axis=-1) for row in rows[:2]]
            self.agreements.append(best[0] == best[1])

    def metrics(self) -> dict[str, float]:
        """The metrics of all added cases."""
        values = {"max_abs": self.max_abs, "max_rel": _ratio(self.max_abs, self.scale)}
        if cosines := [part for part in self.cosines if part.size]:
            # Means over all vectors, not over cases: cases have different numbers of tokens.
            joined = np.concatenate(cosines)
            values |= {"cosine": float(joined.mean()), "cosine_min": float(joined.min())}
        if self.surprise:
            with np.errstate(over="ignore"):
                values["perplexity"] = float(np.nan_to_num(np.exp(np.concatenate(self.surprise).mean()), nan=np.inf))
        if agreements := [part for part in self.agreements if part.size]:
            values["top1"] = float(np.concatenate(agreements).mean())
        return values


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    """Log softmax along the last axis, in double precision."""
    values = scores.astype(np.float64)
    # exp would overflow for large scores.
    values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


def divergence(wanted: np.ndarray, given: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of scores along the last axis, in nats."""
    expected, actual = log_probabilities(wanted), log_probabilities(given)
    return float((np.exp(expected) * (expected - actual)).sum(axis=-1).mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


def _cosines(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows: 1 if both are zero, 0 if one is zero or not finite."""
    finite = np.isfinite(wanted).all(axis=-1) & np.isfinite(got).all(axis=-1)
    wanted, got = np.where(finite[:, None], wanted, 0), np.where(finite[:, None], got, 0)
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(got, axis=-1)
    both_zero = finite & ~wanted.any(axis=-1) & ~got.any(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(norms > 0, (wanted * got).sum(axis=-1) / norms, 0.0)
    # Rounding errors can give a cosine above 1.
    return np.clip(np.where(both_zero, 1.0, cosines), -1.0, 1.0)
