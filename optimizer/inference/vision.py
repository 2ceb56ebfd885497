"""Tasks on images: an `.npz` file of arrays in; a label or an embedding out for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from planish.optimizer.inference.answer_options import TaskOption
from planish.optimizer.inference.postprocessing import classes, embeddings, projected
from planish.optimizer.inference.requests import ArrayRequest, read_rows, stacked
from planish.optimizer.inference.task import Answer, OpenedFolder, Task
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays, Signature
from planish.optimizer.runtime.batching import BatchLimits


@dataclass(kw_only=True)
class ImageTasks(Task):
    """An opened engine for images, which all have one size: nothing is cut."""

    engine: Engine
    signature: Signature
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: OpenedFolder) -> Self:
        """An engine whose inputs are pixels."""
        return cls(
            name=folder.task,
            folder=folder.folder,
            engine=folder.engine(),
            signature=folder.signatures[0],
            config=folder.config,
        )

    @property
    def options(self) -> frozenset[TaskOption]:
        """Those of its function."""
        return IMAGE_FUNCTIONS[self.name].options

    @property
    def array_names(self) -> tuple[str, ...]:
        """The inputs of the engine."""
        return tuple(tensor.name for tensor in self.signature.inputs)

    def requests(self, path: Path) -> Iterator[ArrayRequest]:
        """The images of a file."""
        return read_rows(path, self.signature)

    def answer(self, requests: Sequence[ArrayRequest]) -> list[Answer]:
        """One answer for each image, in order."""
        limits = BatchLimits.of(self.signature)
        return [answer for batch in limits.groups(requests) for answer in self._answer_batch(batch, limits)]

    def _answer_batch(self, requests: Sequence[ArrayRequest], limits: BatchLimits) -> list[Answer]:
        outputs = self.engine.run(stacked(limits.filled(requests)))
        outputs = {name: array[: len(requests)] for name, array in outputs.items()}  # without what filled the batch
        return IMAGE_FUNCTIONS[self.name].answer(self, outputs)


@dataclass(frozen=True)
class ImageFunction:
    """A task on images: the answers that it makes of the outputs for a batch."""

    answer: Callable[[ImageTasks, Arrays], list[Answer]]
    options: frozenset[TaskOption] = frozenset()


def _embeddings(_: ImageTasks, outputs: Arrays) -> list[Answer]:
    """The model's own, or the mean of all places: patches (batch, places, size), a map (batch, size, height, width)."""
    vectors = projected(outputs)
    if vectors is None:
        hidden = outputs["last_hidden_state"]
        vectors = hidden.mean(axis={3: (1,), 4: (2, 3)}.get(hidden.ndim, ()))
    return embeddings(vectors)


def _classes(task: ImageTasks, outputs: Arrays) -> list[Answer]:
    return classes(task.config, outputs, task.asked.logits)


IMAGE_FUNCTIONS: Mapping[str, ImageFunction] = {
    "feature-extraction": ImageFunction(_embeddings),
    "image-classification": ImageFunction(_classes, options=frozenset({TaskOption.LOGITS})),
}
