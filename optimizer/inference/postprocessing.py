"""Outputs of a model to labels, scores and vectors, for texts and images alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from planish.optimizer.ir.program import Arrays


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """The logistic function of logits, without overflow at either end."""
    from scipy.special import expit

    return np.asarray(expit(scores))


def label(config: Mapping[str, Any], index: int) -> str:
    """The name of a class in a model's configuration."""
    names = config.get("id2label")
    return str(names.get(str(index), f"LABEL_{index}")) if isinstance(names, dict) else f"LABEL_{index}"


def class_scores(config: Mapping[str, Any], logits: np.ndarray) -> np.ndarray:
    """Scores of a classifier's logits (…, labels), by the rules of transformers' own pipelines.

    A regression keeps its logits, a single logit and labels that do not exclude each other get a sigmoid, the labels of
    all others a softmax.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return logits
    if kind == "multi_label_classification" or logits.shape[-1] == 1:
        return sigmoid(logits)
    return softmax(logits)


def classes(config: Mapping[str, Any], outputs: Arrays, raw: bool = False) -> list[dict[str, Any]]:
    """The likeliest class and the scores of all, the likeliest first; with ``raw`` scores are the logits."""
    answers = []
    for row in outputs["logits"] if raw else class_scores(config, outputs["logits"]):
        order = np.argsort(-row, kind="stable")
        scores = {label(config, int(index)): float(row[index]) for index in order}
        answers.append({"label": label(config, int(order[0])), "score": float(row[order[0]]), "scores": scores})
    return answers


def embeddings(vectors: np.ndarray) -> list[dict[str, Any]]:
    """An answer for each vector (batch, size)."""
    return [{"embedding": [float(value) for value in row]} for row in vectors]


def projected(outputs: Arrays) -> np.ndarray | None:
    """One vector for each text or image, where the class of the model gives that itself: CLIP's projections, DPR."""
    names = ["text_embeds", "image_embeds", *([] if "last_hidden_state" in outputs else ["pooler_output"])]
    return next((np.asarray(outputs[name]) for name in names if name in outputs), None)
