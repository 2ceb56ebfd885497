"""Pooling, and the layers behind it, of sentence-transformers: hidden states to vectors, in numpy.

The formulas are those of the modules of the same names in sentence-transformers 2 to 5 (Reimers and Gurevych 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TokenStates:
    """Hidden states (batch, tokens, size), their ``mask`` (batch, tokens), and ``kept``: the mask without a prompt."""

    hidden: np.ndarray
    mask: np.ndarray
    kept: np.ndarray


def _cls(states: TokenStates) -> np.ndarray:
    first = (states.mask != 0).argmax(axis=1)  # behind padding on the left
    return np.asarray(states.hidden[np.arange(len(first)), first])


def _last(states: TokenStates) -> np.ndarray:
    last = states.mask.shape[1] - 1 - (states.mask[:, ::-1] != 0).argmax(axis=1)
    return np.asarray(states.hidden[np.arange(len(last)), last])


def _max(states: TokenStates) -> np.ndarray:
    return np.asarray(np.where(states.kept[..., None] != 0, states.hidden, -np.inf).max(axis=1))


def _mean(states: TokenStates, weights: np.ndarray | None = None, power: float = 1.0) -> np.ndarray:
    weighted = (states.kept if weights is None else states.kept * weights).astype(states.hidden.dtype)
    total = np.maximum(weighted.sum(axis=1, keepdims=True), 1e-9)
    return np.asarray(np.einsum("bth,bt->bh", states.hidden, weighted) / total**power)


def _weighted_mean(states: TokenStates) -> np.ndarray:
    """A token weighs as much as its place in its own text (Muennighoff 2022): padding in front is not counted."""
    return _mean(states, np.cumsum(states.mask != 0, axis=1))


POOLINGS: Mapping[str, Callable[[TokenStates], np.ndarray]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda states: _mean(states, power=0.5),
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""Vectors (batch, size) of hidden states, by the name of the pooling mode."""


def _gelu(values: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return np.asarray(values * 0.5 * (1 + erf(values / np.sqrt(2))))


def _logistic(values: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(values))


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "GELU": _gelu,
    "Identity": np.asarray,
    "ReLU": lambda values: np.maximum(values, 0),
    "SiLU": lambda values: values * _logistic(values),
    "Sigmoid": _logistic,
    "Tanh": np.tanh,
}
"""By the name of the class of torch."""


class VectorLayer(Protocol):
    """A module behind the pooling: vectors (batch, size) in and out."""

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Transform vectors (batch, size)."""


@dataclass(frozen=True)
class Normalize:
    """Vectors of length one."""

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Divide each vector by its norm."""
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


@dataclass(frozen=True)
class Dense:
    """A linear map, its activation, and the input once more where the module is residual."""

    weight: np.ndarray
    bias: np.ndarray | None
    activation: str
    residual: np.ndarray | bool = False
    """The map of the input that is added; True: the input itself."""

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Map, activate, and add the input where the module is residual."""
        mapped = vectors @ self.weight.T + (0 if self.bias is None else self.bias)
        mapped = ACTIVATIONS[self.activation](mapped)
        if isinstance(self.residual, np.ndarray):
            return np.asarray(mapped + vectors @ self.residual.T)
        return np.asarray(mapped + vectors if self.residual else mapped)


@dataclass(frozen=True)
class LayerNorm:
    """Vectors of mean zero and variance one, scaled and moved."""

    weight: np.ndarray
    bias: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Normalize, scale and move each vector."""
        centred = vectors - vectors.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + 1e-5) * self.weight + self.bias)
