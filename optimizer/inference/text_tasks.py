"""Tasks on texts: texts in; labels, embeddings, spans, words or choices out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.answer_options import TaskOption
from planish.optimizer.inference.postprocessing import classes, embeddings, label, projected, softmax
from planish.optimizer.inference.requests import TextRequest, read_texts
from planish.optimizer.inference.task import Answer, OpenedFolder, Task
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.batching import BatchLimits
from planish.optimizer.runtime.sentence_modules import SentenceModules, read_modules
from planish.optimizer.runtime.tokenization import ENDLESS, encode, length_limit

_MASK_WORDS = 5
"""Words that are given for each mask."""
_SPAN_TOKENS = 30
"""Most tokens of an answer in a context."""


@dataclass(kw_only=True)
class TextTasks(Task):
    """An opened engine with its tokenizer, for one of `TEXT_FUNCTIONS`.

    Texts of more tokens than ``longest`` are cut, and the answer says so.
    """

    engine: Engine
    tokenizer: Any
    config: Mapping[str, Any]
    limits: BatchLimits = field(default_factory=BatchLimits)
    modules: SentenceModules = field(default_factory=SentenceModules)
    """The checkpoint's sentence-transformers files; of embeddings only."""
    prompt: str = field(init=False)
    """The text put before each text that is embedded."""

    def __post_init__(self) -> None:
        """UsageError if the checkpoint has no prompt of the name that is asked for."""
        self.prompt = self.modules.prompt(self.asked.prompt)

    @classmethod
    def open(cls, folder: OpenedFolder) -> Self:
        """An engine whose inputs are tokens, and which needs a tokenizer."""
        embeds = TEXT_FUNCTIONS[folder.task].embeds
        modules = read_modules(folder.folder) if embeds else SentenceModules()
        return cls(
            name=folder.task,
            folder=folder.folder,
            longest=_longest(folder, modules.longest),
            engine=folder.engine(),
            tokenizer=folder.tokenizer,
            config=folder.config,
            limits=BatchLimits.of(folder.signatures[0]),
            modules=modules,
        )

    @property
    def options(self) -> frozenset[TaskOption]:
        """Those of its function."""
        return TEXT_FUNCTIONS[self.name].options

    def requests(self, path: Path) -> Iterator[TextRequest]:
        """The texts of a file."""
        return read_texts(path)

    def answer(self, requests: Sequence[TextRequest]) -> list[Answer]:
        """One answer for each request, in order; as many as the engine takes at once run as one padded batch."""
        prepared = [replace(r, text=self.modules.prepared(r.text, self.prompt)) for r in requests]
        # A text without a second one is no pair with an empty one: it has other tokens.
        runs = [list(run) for _, run in itertools.groupby(prepared, lambda request: bool(request.pair))]
        return [answer for run in runs for batch in self.limits.groups(run) for answer in self._answer_batch(batch)]

    def tokens(self, *texts: Any, **options: Any) -> Any:
        """The tokens of a text, of a pair, or of several, as the tokenizer gives them."""
        return encode(self.tokenizer, self.folder, *texts, **options)

    def _answer_batch(self, requests: Sequence[TextRequest]) -> list[Answer]:
        encoded = self._encode(requests)
        names = [tensor.name for tensor in self.engine.inputs if tensor.name in encoded]
        feeds = {name: self.limits.rows(np.asarray(encoded[name])) for name in names}
        outputs = {name: array[: len(requests)] for name, array in self.engine.run(feeds).items()}
        self._check(outputs, encoded)
        answers = TEXT_FUNCTIONS[self.name].answer(self, AnsweredBatch(requests, encoded, outputs))
        return [answer | cut for answer, cut in zip(answers, self._cuts(requests, encoded), strict=True)]

    def _check(self, outputs: Arrays, encoded: Mapping[str, Any]) -> None:
        """BadInput if the engine's outputs are not those of the task: its files are of several models."""
        rows, tokens = np.asarray(encoded["input_ids"]).shape[:2]
        function = TEXT_FUNCTIONS[self.name]
        axes_by_output = function.outputs
        vectors = projected(outputs) if function.embeds else None
        if vectors is not None:  # the class has a projection of its own: DPR's gives nothing else
            axes_by_output = {next(name for name, array in outputs.items() if array is vectors): ("batch", "size")}
        sizes = {"batch": rows, "tokens": tokens, "choices": tokens}
        for name, axes in axes_by_output.items():
            shape = outputs[name].shape if name in outputs else ()
            if len(shape) != len(axes) or any(sizes.get(a, n) != n for a, n in zip(axes, shape, strict=True)):
                raise BadInput(
                    f"{self.name} needs an output {name} of shape ({', '.join(axes)}), the engine gives "
                    + (str(list(shape)) if name in outputs else ", ".join(outputs)),
                    where=self.folder,
                    advice="its files are of several models: build it again",
                )

    def _encode(self, requests: Sequence[TextRequest]) -> Mapping[str, Any]:
        padding = self.limits.padding(self.longest)
        if TaskOption.CHOICES in self.options:
            return self._encode_choices(requests, padding)
        pairs = [request.pair for request in requests if request.pair]
        texts = [request.text for request in requests]
        offsets = {"return_offsets_mapping": True} if TEXT_FUNCTIONS[self.name].needs_offsets else {}
        encoded = self.tokens(texts, *([pairs] if pairs else []), **padding, **offsets)
        sequence_ids = [encoded.sequence_ids(index) for index in range(len(texts))] if offsets else []
        return {**encoded, "sequence_ids": sequence_ids}

    def _encode_choices(self, requests: Sequence[TextRequest], padding: Mapping[str, Any]) -> Mapping[str, Any]:
        counts = {len(request.choices) for request in requests}
        if len(counts) != 1 or 0 in counts:
            raise BadInput("questions of one batch need the same number of choices, at least one")
        texts = [request.text for request in requests for _ in request.choices]
        flat = self.tokens(texts, [choice for request in requests for choice in request.choices], **padding)
        return {name: array.reshape(len(requests), -1, array.shape[-1]) for name, array in flat.items()}

    def _cuts(self, requests: Sequence[TextRequest], encoded: Mapping[str, Any]) -> Iterator[Answer]:
        """`{"truncated": true}` for each text that reached the limit and would have gone beyond it."""
        for index, request in enumerate(requests):
            full = (
                self.longest is not None
                and int(np.sum(encoded["attention_mask"][index], axis=-1).max()) >= self.longest
            )
            yield {"truncated": True} if full and self._is_too_long(request) else {}

    def _is_too_long(self, request: TextRequest) -> bool:
        """True if a text has more tokens than the engine takes."""
        seconds = request.choices or (request.pair or None,)
        return any(len(self.tokens(request.text, second)["input_ids"]) > (self.longest or 0) for second in seconds)


def _longest(folder: OpenedFolder, max_seq_length: int | None) -> int | None:
    """The smallest of the limits of the graph and of the files for texts."""
    axes = {} if folder.manifest is None else folder.signatures[0].axes
    of_graph = axes["sequence"].maximum if "sequence" in axes else None
    limits = [of_graph, max_seq_length or length_limit(folder.tokenizer, folder.folder)]
    return min((int(limit) for limit in limits if limit is not None and limit < ENDLESS), default=None)


@dataclass(frozen=True)
class AnsweredBatch:
    """Requests that ran together, their tokens by name, and the engine's outputs for them."""

    requests: Sequence[TextRequest]
    encoded: Mapping[str, Any]
    outputs: Arrays


@dataclass(frozen=True)
class TextFunction:
    """A task on texts: the answers that it makes of a batch, and what it needs for them."""

    answer: Callable[[TextTasks, AnsweredBatch], list[Answer]]
    outputs: Mapping[str, tuple[str, ...]]
    """The axes of each output that it reads; other outputs, or another number of axes, are refused."""
    needs_offsets: bool = False
    """True if it needs the place of each token in its text, and the text of a pair that it belongs to."""
    embeds: bool = False
    """True for embeddings: sentence-transformers files apply, and a projected vector may stand for ``outputs``."""
    options: frozenset[TaskOption] = frozenset()


def _embeddings(task: TextTasks, batch: AnsweredBatch) -> list[Answer]:
    """Pooled and projected as the checkpoint's sentence-transformers files say; the mean of the tokens without any.

    Classes with a projection of their own give the vector itself.
    """
    vectors = projected(batch.outputs)
    if vectors is None:
        special = task.tokenizer.all_special_ids
        prompt_length = task.modules.prompt_length(task.prompt, lambda text: task.tokens(text)["input_ids"], special)
        mask = np.asarray(batch.encoded["attention_mask"])
        vectors = task.modules.embed(batch.outputs["last_hidden_state"], mask, prompt_length)
    return embeddings(vectors)


def _classes(task: TextTasks, batch: AnsweredBatch) -> list[Answer]:
    return classes(task.config, batch.outputs, task.asked.logits)


def _scores(task: TextTasks, batch: AnsweredBatch) -> np.ndarray:
    """The scores of the labels or choices, logits if those are asked for."""
    logits = batch.outputs["logits"]
    return logits if task.asked.logits else softmax(logits)


def _tags(task: TextTasks, batch: AnsweredBatch) -> list[Answer]:
    """The likeliest label of each token; special tokens, which stand nowhere in the text, are left out."""
    answers = []
    rows = _scores(task, batch)
    for request, offsets, row in zip(batch.requests, batch.encoded["offset_mapping"], rows, strict=True):
        tokens = [
            {
                "word": request.text[start:end],
                "label": label(task.config, int(scores.argmax())),
                "score": float(scores.max()),
                "start": int(start),
                "end": int(end),
            }
            for (start, end), scores in zip(offsets, row, strict=True)
            if end > start
        ]
        answers.append({"tokens": tokens})
    return answers


def _spans(_: TextTasks, batch: AnsweredBatch) -> list[Answer]:
    """The best span inside the context: start before end, at most 30 tokens."""
    answers = []
    for index, request in enumerate(batch.requests):
        if not request.pair:
            raise BadInput(
                "a question needs a context", advice="give --pair, or 'question' and 'context' in a .jsonl file"
            )
        in_context = np.array([part == 1 for part in batch.encoded["sequence_ids"][index]])
        start, end = (
            np.where(in_context, softmax(batch.outputs[name][index]), 0) for name in ("start_logits", "end_logits")
        )
        scores = np.triu(np.outer(start, end)) - np.triu(np.outer(start, end), _SPAN_TOKENS)
        first, last = np.unravel_index(int(scores.argmax()), scores.shape)
        offsets = batch.encoded["offset_mapping"][index]
        begin, finish = int(offsets[first][0]), int(offsets[last][1])
        text = request.pair[begin:finish]
        answers.append({"answer": text, "score": float(scores[first, last]), "start": begin, "end": finish})
    return answers


def _words(task: TextTasks, batch: AnsweredBatch) -> list[Answer]:
    """The likeliest words for each mask of a text."""
    answers = []
    decode = task.tokenizer.decode
    for ids, row in zip(batch.encoded["input_ids"], batch.outputs["logits"], strict=True):
        places = np.flatnonzero(np.asarray(ids) == task.tokenizer.mask_token_id)
        if not len(places):
            raise BadInput(f"the text has no {task.tokenizer.mask_token} to fill")
        masks = []
        for logits in row[places]:
            scores = softmax(logits)
            best = [int(token) for token in np.argsort(-logits, kind="stable")[:_MASK_WORDS]]
            masks.append([{"word": decode([token]).strip(), "score": float(scores[token])} for token in best])
        answers.append({"masks": masks})
    return answers


def _choices(task: TextTasks, batch: AnsweredBatch) -> list[Answer]:
    return [
        {
            "choice": int(row.argmax()),
            "text": request.choices[int(row.argmax())],
            "scores": [float(value) for value in row],
        }
        for request, row in zip(batch.requests, _scores(task, batch), strict=True)
    ]


_SCORED = frozenset({TaskOption.LOGITS})

TEXT_FUNCTIONS: Mapping[str, TextFunction] = {
    "feature-extraction": TextFunction(
        _embeddings,
        {"last_hidden_state": ("batch", "tokens", "size")},
        embeds=True,
        options=frozenset({TaskOption.PROMPT}),
    ),
    "text-classification": TextFunction(_classes, {"logits": ("batch", "labels")}, options=_SCORED),
    "token-classification": TextFunction(
        _tags, {"logits": ("batch", "tokens", "labels")}, needs_offsets=True, options=_SCORED
    ),
    "question-answering": TextFunction(
        _spans, {"start_logits": ("batch", "tokens"), "end_logits": ("batch", "tokens")}, needs_offsets=True
    ),
    "fill-mask": TextFunction(_words, {"logits": ("batch", "tokens", "vocabulary")}),
    "multiple-choice": TextFunction(_choices, {"logits": ("batch", "choices")}, options=_SCORED | {TaskOption.CHOICES}),
}
"""Tasks on texts by their names. A new one is a function and an entry here."""
