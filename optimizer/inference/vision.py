"""Answers of engines that see or hear: an `.npz` file of arrays in; a label, embedding or text out for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import SIGNALS, Arrays, Role, Signature, TensorSpec, leading_axis
from planish.optimizer.runtime.array_files import read_arrays
from planish.optimizer.runtime.batching import BatchLimits


@dataclass(frozen=True)
class Row:
    """One image or recording: its arrays by name, without the axis that counts them."""

    arrays: Arrays


def takes_arrays(inputs: Sequence[TensorSpec]) -> bool:
    """Whether a component sees or hears: it takes pixels or spectra, and no tokens."""
    roles = {tensor.role for tensor in inputs}
    return bool(roles & SIGNALS) and Role.TOKENS not in roles


def read_rows(path: Path, signature: Signature) -> Iterator[Row]:
    """Images or recordings of an `.npz` file, one after the other; BadInput if it is another file or does not fit."""
    if path.suffix != ".npz":
        names = " and ".join(tensor.name for tensor in signature.inputs)
        raise BadInput(f"this engine takes {names}, not texts", where=path, advice="give an .npz file of arrays")
    counts = leading_axis(signature)  # a file may hold any number of them
    others = {name: axis for name, axis in signature.axes.items() if name != counts}
    arrays = read_arrays(path, replace(signature, axes=others))
    for index in range(len(next(iter(arrays.values())))):
        yield Row({name: array[index] for name, array in arrays.items()})


def stacked(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The arrays of several rows as one batch."""
    return {name: np.stack([row.arrays[name] for row in rows]) for name in rows[0].arrays}


@dataclass
class ImageTasks:
    """An opened engine for images."""

    engine: Engine
    signature: Signature
    task: str
    config: Mapping[str, Any]
    folder: Path
    longest: int | None = None
    """Nothing is cut: images have one size."""
    raw: bool = False
    """Whether scores are logits, as the head gives them."""

    def answer(self, questions: Sequence[Any]) -> list[dict[str, Any]]:
        """One answer for each image (a `Row`), in order; as many as the engine takes at once run as one batch."""
        room = BatchLimits.of(self.signature)
        return [answer for group in room.groups(questions) for answer in self._answer(group, room)]

    def _answer(self, questions: Sequence[Row], room: BatchLimits) -> list[dict[str, Any]]:
        outputs = self.engine.run(stacked(room.filled(questions)))
        kept = {name: array[: len(questions)] for name, array in outputs.items()}
        return _ANSWERS[self.task](self.config, kept, self.raw)

    def questions(self, path: Path) -> Iterator[Row]:
        """The images of a file."""
        return read_rows(path, self.signature)


def perceiver(engine: Engine, signature: Signature, task: str, config: Mapping[str, Any], folder: Path) -> ImageTasks:
    """An engine that answers; BadInput if nothing but arrays can be made of its outputs."""
    if task not in _ANSWERS:
        raise BadInput(
            f"answers of task {task!r} are arrays", where=folder, advice="run it from Python: engine.run({…})"
        )
    return ImageTasks(engine, signature, task, config, folder)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """The logistic function of logits, without overflow at either end."""
    from scipy.special import expit

    return np.asarray(expit(scores))


def label(config: Mapping[str, Any], index: int) -> str:
    """What a configuration calls one of its classes."""
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
    found = []
    for row in outputs["logits"] if raw else class_scores(config, outputs["logits"]):
        order = np.argsort(-row, kind="stable")
        scores = {label(config, int(index)): float(row[index]) for index in order}
        found.append({"label": label(config, int(order[0])), "score": float(row[order[0]]), "scores": scores})
    return found


def _embeddings(_: Mapping[str, Any], outputs: Arrays, __: bool) -> list[dict[str, Any]]:
    """The model's own, or the mean of all places: patches (batch, places, size), a map (batch, size, height, width)."""
    vectors = projected(outputs)
    if vectors is None:
        hidden = outputs["last_hidden_state"]
        vectors = hidden.mean(axis={3: (1,), 4: (2, 3)}.get(hidden.ndim, ()))
    return [{"embedding": [float(value) for value in row]} for row in vectors]


def projected(outputs: Arrays) -> np.ndarray | None:
    """One vector for each text or image, where the class of the model gives that itself: CLIP's projections, DPR."""
    names = ["text_embeds", "image_embeds", *([] if "last_hidden_state" in outputs else ["pooler_output"])]
    return next((np.asarray(outputs[name]) for name in names if name in outputs), None)


_ANSWERS: Mapping[str, Callable[[Mapping[str, Any], Arrays, bool], list[dict[str, Any]]]] = {
    "feature-extraction": _embeddings,
    "image-classification": classes,
}
