"""How far outputs stray from the reference, and how far they may: pure metrics and budgets.

Metrics, over all cases, at positions that are not padding (padded positions carry no meaning):

==========  ==========================================================================================
max_abs     largest absolute difference
max_rel     largest absolute difference, divided by the largest magnitude of the reference output
cosine      mean cosine of the vectors along the last axis
cosine_min  smallest such cosine
top1        share of vectors whose largest entry stays the largest (logits only)
perplexity  of the next tokens of the inputs, as a multiple of the original's (decoders only)
kl, greedy  of continuations, see `fidelity/generation_metrics.py`
score       what a command of the user's own prints, see `fidelity/user_metric.py`; as a multiple of the plain
            engine's it is score_ratio, in a budget `score>=0.98x`
==========  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planish.optimizer.ir.program import SUM, Role, Signature, TensorSpec
from planish.optimizer.runtime.cases import Case

METRICS = ("max_abs", "max_rel", "cosine", "cosine_min", "top1", "perplexity", "kl", "greedy", "score")
ERRORS = ("max_abs", "max_rel", "perplexity", "kl")
"""Metrics of which less is better."""
CONTINUED = ("kl", "greedy", "top1")
"""Metrics of continuations."""
JUDGED = ("score", "score_ratio")
"""Metrics of the user's own measure."""
CACHE = "cache"
"""What the tensors of a cache are called together, where outputs are compared."""
MULTIPLES = ("perplexity", "score_ratio")
"""Metrics that are multiples of the original's."""
_BLOCK = 1 << 16
"""Elements that are compared at a time."""
_ABSURD = 1e20
"""Magnitudes that stand for minus infinity in masked scores; they do not set the scale of an output."""


@dataclass(frozen=True)
class Comparison:
    """Metrics by output name. ``top1`` is absent where the output is not a vector of scores."""

    outputs: Mapping[str, Mapping[str, float]]

    def worst(self, metric: str) -> float | None:
        """The least favourable value of ``metric`` over the outputs that have it."""
        values = [metrics[metric] for metrics in self.outputs.values() if metric in metrics]
        return None if not values else (max(values) if metric in ERRORS else min(values))

    def rounded(self, digits: int = 3) -> Comparison:
        """The same to a few significant digits: figures for people and for manifests."""
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
    return 1.0 - float(f"{1.0 - value:.{digits - 1}e}")


def relation_of(metric: str) -> str:
    """How a budget on a metric is written: errors stay below a bound, similarities above."""
    return "<=" if metric in ERRORS else ">="


def compare(
    signature: Signature, inputs: Sequence[Case], expected: Sequence[Case], actual: Iterable[Case]
) -> Comparison:
    """Compare the outputs of several cases; every sequence has one entry per case, arrays by name.

    Of ``actual`` one case is held at a time.

    ValueError if an output is missing or has another shape than expected.
    """
    tallies = {tensor.name: _Tally(tensor) for tensor in signature.outputs if tensor.name in expected[0]}
    for feeds, wanted, got in zip(inputs, expected, actual, strict=True):
        for name, tally in tallies.items():
            if name not in got:
                raise ValueError(f"output {name!r} is missing")
            visible = visible_part(signature, tally.tensor, feeds, wanted[name])
            tally.add(wanted[name], got[name], visible)
            if signature.cached and tally.tensor.role is Role.LOGITS:
                tally.read_on(feeds.get("input_ids"), wanted[name], got[name], visible)
    return Comparison(_joined({name: (tally.tensor, tally.metrics()) for name, tally in tallies.items()}))


def _joined(found: Mapping[str, tuple[TensorSpec, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Metrics by output; those of a cache, of which there are two a layer, as one: the worst of each."""
    parts = Comparison({name: metrics for name, (tensor, metrics) in found.items() if tensor.role is Role.CACHE})
    rest = {name: metrics for name, (tensor, metrics) in found.items() if tensor.role is not Role.CACHE}
    worst = {metric: parts.worst(metric) for metric in METRICS}
    cache = {metric: value for metric, value in worst.items() if value is not None}
    return rest | ({CACHE: cache} if cache else {})


def visible_part(signature: Signature, tensor: TensorSpec, feeds: Case, wanted: np.ndarray) -> np.ndarray | None:
    """Where an output ``wanted`` for the inputs ``feeds`` means something, as a mask that fits it; None: everywhere.

    That is everywhere as well where a file declares another shape than it gives.
    """
    mask = signature.mask()
    visible = _visible(tensor, mask, None if mask is None else feeds.get(mask.name))
    if visible is None or visible.ndim != wanted.ndim:
        return None
    visible = _end(visible, tensor, wanted)
    fits = all(size in (1, whole) for size, whole in zip(visible.shape, wanted.shape, strict=True))
    return visible if fits else None


def _end(visible: np.ndarray, tensor: TensorSpec, wanted: np.ndarray) -> np.ndarray:
    """The last entries of a mask that is longer than the output along its sequence."""
    axis = tensor.axis_index("sequence")
    if axis is None or visible.shape[axis] <= wanted.shape[axis]:
        return visible
    return visible.take(range(visible.shape[axis] - wanted.shape[axis], visible.shape[axis]), axis)


def _visible(tensor: TensorSpec, mask: TensorSpec | None, counts: np.ndarray | None) -> np.ndarray | None:
    """Where an output means something: the mask, laid along the axes that the output shares with it.

    An output of the new tokens alone (`sequence`) shares the end of a mask over past and new ones.
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
        """How much less likely the engine holds each next token than the original does, in nats."""
        self.agreements: list[np.ndarray] = []

    def add(self, expected: np.ndarray, actual: np.ndarray, visible: np.ndarray | None) -> None:
        """Take in one case."""
        if expected.shape != actual.shape:
            raise ValueError(f"output {self.tensor.name!r} has shape {actual.shape}, expected {expected.shape}")
        if not expected.size:
            return
        width = expected.shape[-1] if expected.ndim else 1
        wanted, got = expected.reshape(-1, width), actual.reshape(-1, width)
        shown = np.broadcast_to(True if visible is None else visible, expected.shape).reshape(-1, width)
        step = max(1, _BLOCK // width)
        for rows in (slice(start, start + step) for start in range(0, len(wanted), step)):
            self._add_rows(wanted[rows], got[rows], shown[rows], vectors=expected.ndim > 0)

    def read_on(
        self, ids: np.ndarray | None, expected: np.ndarray, actual: np.ndarray, visible: np.ndarray | None
    ) -> None:
        """Take in how likely the next token of each text is, where the scores are those of all words at each token."""
        if ids is None or expected.shape[:-1] != ids.shape or expected.shape[-1] != self.tensor.shape[-1]:
            return
        both = np.ones(ids[:, 1:].shape, bool)
        if visible is not None:
            seen = np.broadcast_to(visible, expected.shape)[..., 0]
            both = seen[:, 1:] & seen[:, :-1]
        following = ids[:, 1:][both]
        if following.size:
            found = [log_likelihoods(scores[:, :-1], both, following) for scores in (expected, actual)]
            self.surprise.append(found[0] - found[1])

    def _add_rows(self, expected: np.ndarray, actual: np.ndarray, shown: np.ndarray, *, vectors: bool) -> None:
        """Take in a few rows, as many as stay in the processor's cache."""
        wanted = np.where(shown, expected, 0).astype(np.float64, copy=False)
        got = np.where(shown, actual, 0).astype(np.float64, copy=False)
        same = (wanted == got) | (np.isnan(wanted) & np.isnan(got))  # also equal infinities
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(wanted - got))
        self.max_abs = max(self.max_abs, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        ordinary = np.abs(wanted[np.isfinite(wanted) & (np.abs(wanted) < _ABSURD)])
        self.scale = max(self.scale, float(ordinary.max(initial=0.0)))
        if vectors:
            self._add_vectors(wanted, got, shown)

    def _add_vectors(self, wanted: np.ndarray, got: np.ndarray, shown: np.ndarray) -> None:
        kept = shown.any(axis=-1)
        rows = [array[kept] for array in (wanted, got, shown)]
        self.cosines.append(_cosines(rows[0], rows[1]))
        if self.tensor.role is Role.LOGITS and wanted.shape[-1] > 1:
            best = [np.where(rows[2], row, -np.inf).argmax(axis=-1) for row in rows[:2]]
            self.agreements.append(best[0] == best[1])

    def metrics(self) -> dict[str, float]:
        """The metrics of everything taken in."""
        found = {"max_abs": self.max_abs, "max_rel": _ratio(self.max_abs, self.scale)}
        if cosines := [part for part in self.cosines if part.size]:
            joined = np.concatenate(cosines)
            found |= {"cosine": float(joined.mean()), "cosine_min": float(joined.min())}
        if self.surprise:
            with np.errstate(over="ignore"):
                found["perplexity"] = float(np.nan_to_num(np.exp(np.concatenate(self.surprise).mean()), nan=np.inf))
        if agreements := [part for part in self.agreements if part.size]:
            found["top1"] = float(np.concatenate(agreements).mean())
        return found


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    """Of scores along the last axis, in double precision."""
    values = scores.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


def log_likelihoods(scores: np.ndarray, shown: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Log probabilities of ``words``, one for each row of ``scores`` (…, vocabulary) that is ``shown``, in their order.

    Row by row and in single precision, since vocabularies are large; sums are in double.
    """
    found = np.empty(words.shape, np.float64)
    for place, (row, word) in enumerate(zip(np.argwhere(shown), words, strict=True)):
        values = scores[tuple(row)].astype(np.float32, copy=False)
        shifted = values - values.max()
        found[place] = shifted[word] - np.log(np.exp(shifted).sum(dtype=np.float64))
    return found


def divergence(wanted: np.ndarray, given: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of scores along the last axis, in nats."""
    one, other = log_probabilities(wanted), log_probabilities(given)
    return float((np.exp(one) * (one - other)).sum(axis=-1).mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


def _cosines(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows: 1 where both are zero, 0 where one is zero or not finite."""
    finite = np.isfinite(wanted).all(axis=-1) & np.isfinite(got).all(axis=-1)
    wanted, got = np.where(finite[:, None], wanted, 0), np.where(finite[:, None], got, 0)
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(got, axis=-1)
    both_zero = finite & ~wanted.any(axis=-1) & ~got.any(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(norms > 0, (wanted * got).sum(axis=-1) / norms, 0.0)
    return np.clip(np.where(both_zero, 1.0, cosines), -1.0, 1.0)
