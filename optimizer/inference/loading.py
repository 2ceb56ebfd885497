"""A folder that Planish wrote, opened in Python: `load("build/m")("a text")`."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
from pydantic import TypeAdapter, ValidationError

from planish.optimizer.errors import UsageError, first_fault, printable
from planish.optimizer.inference.answer_options import AnswerFields, AnswerOptions, TaskOption
from planish.optimizer.inference.requests import ArrayRequest, TextRequest
from planish.optimizer.inference.session import engine_at, open_task, takes_arrays, with_options
from planish.optimizer.inference.task import Task
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Role
from planish.optimizer.output.manifest import Manifest, engine_folder
from planish.optimizer.runtime.generation import Decoding, Sampling
from planish.optimizer.system.staging import MANIFEST

_WIDTH = 78
"""Columns of a terminal that a model's text fits."""


def load(folder: str | Path, target: str | None = None) -> LoadedModel:
    """Open an output of Planish, or an engine folder in it.

    ``target`` says which engine, with its options: `openvino{threads=2}`; without it, the first that runs here.
    BadInput if there is none, MissingRuntime if its runtime is not installed.
    """
    return LoadedModel(Path(folder), target)


class LoadedModel:
    """An opened engine that answers by its task; with `with`, it is closed at the end."""

    def __init__(self, folder: Path, target: str | None) -> None:
        self.folder = folder
        place, self.target = engine_at(folder, target)
        self._place, self._target_option, self._closed = place, target, False
        self._output = place.parent if (place.parent / MANIFEST).is_file() else None
        self.manifest = None if self._output is None else Manifest.read(self._output)
        records = {} if self.manifest is None else self.manifest.signatures
        self._signatures = [record.signature() for record in records.values()]
        self._has_components = list(records) not in ([], ["model"])
        self._generates = any(signature.cached for signature in self._signatures)
        if not self._generates:
            self.engine  # noqa: B018 - an engine that cannot be opened is told now, not at the first call

    @property
    def task(self) -> str:
        """The task that it serves: `text-classification`, `feature-extraction`, `text-generation`, …"""
        return self._task.name if self.manifest is None else self.manifest.task

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine itself: `engine.run({name: array})`. UsageError if it has several components."""
        self._refuse_closed()
        if self._has_components:
            raise UsageError("this engine has several components", advice="use model.decoding()")
        return registry.backend(self.target).open(self._place)

    @functools.cached_property
    def engines(self) -> dict[str, Engine]:
        """Every engine of the output that this machine can open, by the name of its folder; they stay open.

        UsageError if they have several components.
        """
        name, first = self._place.name, self.engine  # first: it refuses what no other needs to be opened for
        if self.manifest is None or self._output is None:
            return {name: first}
        runnable = [other for other in self.manifest.targets if self.manifest.backend(other).missing() is None]
        opened = {o: self.manifest.backend(o).open(engine_folder(self._output, o)) for o in runnable if o != name}
        return {**opened, name: first}

    def decoding(self, name: str | None = None) -> Decoding:
        """The decode loop of the engine, or of the one in the folder ``name``: texts, token by token."""
        self._refuse_closed()
        if self.manifest is None or self._output is None:
            raise UsageError(f"the components are not known without {MANIFEST}", where=self._place)
        if name is None or name == self._place.name:
            return Decoding.of(registry.backend(self.target), self._place, self.manifest.signatures)
        if name not in self.manifest.targets:
            there = ", ".join(self.manifest.targets)
            raise UsageError(f"there is no engine {name!r}", where=self._output, advice=f"there are: {there}")
        return Decoding.of(self.manifest.backend(name), engine_folder(self._output, name), self.manifest.signatures)

    def __call__(
        self,
        asked: str | Sequence[str] | Mapping[str, np.ndarray],
        pair: str | Sequence[str] | None = None,
        *,
        choices: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **fields: Unpack[AnswerFields],
    ) -> Any:
        """The answer to one text, or a list of answers to a list of texts, by the task.

        An embedding is a NumPy array (a matrix for a list), a written text is a str, every other answer is a dict: what
        `planish run --json` prints. ``pair`` is the second text (the context of a question), ``choices`` what a
        multiple choice chooses among; for a list of texts both are lists. Of the options by name, ``prompt`` names a
        prompt of a sentence-transformers checkpoint, ``logits`` leaves out softmax and sigmoid; ``max_new_tokens`` and
        ``temperature``, ``top_k``, ``top_p``, ``seed`` are for engines that generate. Arrays by name are answered row
        by row where the engine takes images or recordings, else they give its outputs. UsageError for an option
        without effect.
        """
        self._refuse_closed()
        options = AnswerOptions.of(fields)
        if options.max_new_tokens is not None and options.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: {options.max_new_tokens} is not at least 1")
        options = replace(options, sampling=_checked(options.sampling))
        if isinstance(asked, Mapping):
            if pair is not None or choices is not None or options.prompt is not None:
                raise UsageError("arrays have no second text, no choices and no prompt")
            return self._answer_arrays(asked, options)
        task = with_options(self._task, options)
        if task.array_names:
            names = " and ".join(task.array_names)
            raise UsageError(f"this engine takes {names}, not texts", advice="give {name: array}")
        if isinstance(asked, str):
            return _plain(task.answer(_text_requests([asked], [pair], [choices], task)))[0]
        pairs, several = ([None] * len(asked) if given is None else list(given) for given in (pair, choices))
        return _plain(task.answer(_text_requests(asked, pairs, several, task)))

    def _answer_arrays(self, arrays: Mapping[str, np.ndarray], options: AnswerOptions) -> Any:
        """The answers to rows of arrays where the task takes such, else the outputs of the engine."""
        if takes_arrays(self._signatures[0].inputs if self._signatures else self.engine.inputs):
            task = with_options(self._task, options)
            counts = {len(array) for array in arrays.values()}
            if len(counts) != 1:
                raise UsageError("the arrays have different numbers of rows")
            rows = range(counts.pop())
            requests = [ArrayRequest({name: array[row] for name, array in arrays.items()}, index=row) for row in rows]
            return _plain(task.answer(requests))
        if options != AnswerOptions():
            raise UsageError("options are for texts: arrays give the engine's outputs as they are")
        return self.engine.run(dict(arrays))

    @functools.cached_property
    def _task(self) -> Task:
        return open_task(self.folder, self._target_option, None if self._generates else self.engine)

    def close(self) -> None:
        """Close the engines and free their memory; a call afterwards is a UsageError."""
        self._closed = True
        for name in ("engine", "engines", "_task"):
            self.__dict__.pop(name, None)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError("this model is closed", where=self.folder, advice="load it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _described(self) -> dict[str, str]:
        rows = {"engine": str(self._place), "target": self.target}
        if self.manifest is None:
            return rows
        record = self.manifest.targets.get(self._place.name)
        rows = {"task": self.manifest.task, "model": self.manifest.source.architecture, **rows}
        if record is not None:
            rows |= {"shipped": f"{record.shipped}: {record.why}", "size": f"{record.size_bytes / 1e6:.1f} MB"}
        taken = [tensor for tensor in self._signatures[0].inputs if tensor.role is not Role.CACHE]
        inputs = [f"{t.name} {t.dtype.name}[{', '.join(map(str, t.shape))}]" for t in taken]
        return {**rows, "inputs": ", ".join(inputs)}

    def __repr__(self) -> str:
        """One line that fits a terminal."""
        task = f"{self.manifest.task}, " if self.manifest is not None else ""
        before, after = printable(f"<planish model: {task}{self.target}, "), ", closed>" if self._closed else ">"
        place, width = printable(str(self._place)), max(20, _WIDTH - len(before) - len(after))
        return before + (place if len(place) <= width else f"…{place[-width + 1 :]}") + after

    def _repr_html_(self) -> str:
        """A small table for a notebook; names in it may come from anybody, so everything is escaped."""
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(printable(text))}</td></tr>"
            for name, text in self._described().items()
        )
        return f"<table>{cells}</table>"


def _text_requests(texts: Sequence[Any], pairs: Sequence[Any], choices: Sequence[Any], task: Task) -> list[TextRequest]:
    """Requests whose parts have the types that they should; UsageError says which has not."""
    if not len(texts) == len(pairs) == len(choices):
        raise UsageError(
            f"{len(texts)} texts, {len(pairs)} second texts, {len(choices)} choices do not belong together"
        )
    for text, pair, several in zip(texts, pairs, choices, strict=True):
        if not isinstance(text, str) or not isinstance(pair, str | None):
            wrong = text if not isinstance(text, str) else pair
            raise UsageError(f"this is no text but a {type(wrong).__name__}", advice="give a str or a list of them")
        if (several is not None) != (TaskOption.CHOICES in task.options):
            raise UsageError("choices are what a multiple choice chooses among, and nothing else has them")
        if several is not None and (isinstance(several, str) or not all(isinstance(choice, str) for choice in several)):
            raise UsageError("choices are a list of texts for each text")
    return [TextRequest(t, p, tuple(several or ())) for t, p, several in zip(texts, pairs, choices, strict=True)]


def _plain(answers: list[dict[str, Any]]) -> Any:
    """Answers as Python users want them: a matrix of embeddings, texts alone, or the dicts."""
    if answers and all("embedding" in answer for answer in answers):
        return np.array([answer["embedding"] for answer in answers], np.float32)
    return [answer["text"] if answer.keys() == {"text"} else answer for answer in answers]


def _checked(sampling: Sampling) -> Sampling:
    """The same; UsageError if one of the options is out of its range."""
    try:
        return TypeAdapter(Sampling).validate_python(vars(sampling))
    except ValidationError as error:
        raise UsageError(first_fault(error)) from None
