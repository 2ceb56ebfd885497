"""An engine's answers, by task: texts in, labels, embeddings, spans or words out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.inference.requests import Question, read_questions
from planish.optimizer.inference.vision import classes, label, projected, softmax
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays
from planish.optimizer.runtime.batching import BatchLimits
from planish.optimizer.runtime.sentence_modules import SentenceModules
from planish.optimizer.runtime.tokenization import encode

_TOP = 5


@dataclass
class TextTasks:
    """An opened engine with its tokenizer, for one task."""

    engine: Engine
    tokenizer: Any
    task: str
    config: Mapping[str, Any]
    folder: Path
    longest: int | None
    """Most tokens of one text; longer ones are cut, and the answer says so."""
    room: BatchLimits = field(default_factory=BatchLimits)
    raw: bool = False
    """True if scores are logits, as the head gives them, without softmax or sigmoid."""
    modules: SentenceModules = field(default_factory=SentenceModules)
    """What the checkpoint's sentence-transformers files say; of embeddings only."""
    prompt: str = ""
    """What is put before each text that is embedded."""

    def questions(self, path: Path) -> Iterator[Question]:
        """The questions of a file."""
        return read_questions(path)

    def answer(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """One answer for each question, in order; as many as the engine takes at once run as one padded batch."""
        if self.task == "feature-extraction":
            questions = [replace(q, text=self.modules.prepared(q.text, self.prompt)) for q in questions]
        # A text without a second one is no pair with an empty one: it has other tokens.
        kinds = [list(kind) for _, kind in itertools.groupby(questions, lambda question: bool(question.pair))]
        return [answer for kind in kinds for group in self.room.groups(kind) for answer in self._answer(group)]

    def _answer(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        encoded = self._encode(questions)
        feeds = {t.name: self.room.rows(np.asarray(encoded[t.name])) for t in self.engine.inputs if t.name in encoded}
        outputs = {name: array[: len(questions)] for name, array in self.engine.run(feeds).items()}
        self._check(outputs, encoded)
        found = ANSWERS[self.task](self, questions, encoded, outputs)
        return [answer | cut for answer, cut in zip(found, self._cuts(questions, encoded), strict=True)]

    def _check(self, outputs: Arrays, encoded: Mapping[str, Any]) -> None:
        """BadInput if the engine's outputs are not those of the task: its files are of several models."""
        rows, tokens = np.asarray(encoded["input_ids"]).shape[:2]
        needed = _OUTPUTS[self.task]
        vectors = projected(outputs) if self.task == "feature-extraction" else None
        if vectors is not None:  # the class has a projection of its own: DPR's gives nothing else
            needed = {next(name for name, array in outputs.items() if array is vectors): ("batch", "size")}
        for name, axes in needed.items():
            shape = outputs[name].shape if name in outputs else ()
            known = {"batch": rows, "tokens": tokens, "choices": tokens}
            if len(shape) != len(axes) or any(known.get(a, n) != n for a, n in zip(axes, shape, strict=True)):
                raise BadInput(
                    f"{self.task} needs an output {name} of shape ({', '.join(axes)}), the engine gives "
                    + (str(list(shape)) if name in outputs else ", ".join(outputs)),
                    where=self.folder,
                    advice="its files are of several models: build it again",
                )

    def _encode(self, questions: Sequence[Question]) -> Mapping[str, Any]:
        common = self.room.padding(self.longest)
        if self.task == "multiple-choice":
            return self._encode_choices(questions, common)
        pairs = [question.pair for question in questions if question.pair]
        texts = [question.text for question in questions]
        offsets = {"return_offsets_mapping": True} if self.task in _NEED_OFFSETS else {}
        encoded = self._tokens(texts, *([pairs] if pairs else []), **common, **offsets)
        parts = [encoded.sequence_ids(index) for index in range(len(texts))] if offsets else []
        return {**encoded, "parts": parts}

    def _tokens(self, *texts: Any, **options: Any) -> Any:
        return encode(self.tokenizer, self.folder, *texts, **options)

    def _encode_choices(self, questions: Sequence[Question], common: Mapping[str, Any]) -> Mapping[str, Any]:
        counts = {len(question.choices) for question in questions}
        if len(counts) != 1 or 0 in counts:
            raise BadInput("questions of one batch need the same number of choices, at least one")
        texts = [question.text for question in questions for _ in question.choices]
        flat = self._tokens(texts, [choice for question in questions for choice in question.choices], **common)
        return {name: array.reshape(len(questions), -1, array.shape[-1]) for name, array in flat.items()}

    def _beyond(self, question: Question) -> bool:
        """Whether a text has more tokens than the engine takes."""
        longest = self.longest or 0
        seconds = question.choices or (question.pair or None,)
        return any(len(self._tokens(question.text, second)["input_ids"]) > longest for second in seconds)

    def _cuts(self, questions: Sequence[Question], encoded: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """`{"truncated": true}` for each text that reached the limit and would have gone beyond it."""
        for index, question in enumerate(questions):
            full = (
                self.longest is not None
                and int(np.sum(encoded["attention_mask"][index], axis=-1).max()) >= self.longest
            )
            yield {"truncated": True} if full and self._beyond(question) else {}


HAVE_LOGITS = frozenset({"text-classification", "token-classification", "multiple-choice", "image-classification"})
"""Tasks whose answers have a score for each label or choice."""


def _embeddings(
    answerer: TextTasks, _: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
) -> list[dict[str, Any]]:
    """Pooled and projected as the checkpoint's sentence-transformers files say; the mean of the tokens without any.

    Classes with a projection of their own give the vector itself.
    """
    counted = np.asarray(encoded["attention_mask"])
    special = answerer.tokenizer.all_special_ids
    prompt_length = answerer.modules.prompt_length(
        answerer.prompt, lambda text: answerer._tokens(text)["input_ids"], special
    )
    vectors = projected(outputs)
    if vectors is None:
        vectors = answerer.modules.embed(outputs["last_hidden_state"], counted, prompt_length)
    return [{"embedding": [float(value) for value in row]} for row in vectors]


def _classes(
    answerer: TextTasks, _: Sequence[Question], __: Mapping[str, Any], outputs: Arrays
) -> list[dict[str, Any]]:
    return classes(answerer.config, outputs, answerer.raw)


def _tags(
    answerer: TextTasks, questions: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
) -> list[dict[str, Any]]:
    found = []
    scored = outputs["logits"] if answerer.raw else softmax(outputs["logits"])
    for index, (question, row) in enumerate(zip(questions, scored, strict=True)):
        spans = encoded["offset_mapping"][index]
        tokens = [
            {
                "word": question.text[start:end],
                "label": label(answerer.config, int(scores.argmax())),
                "score": float(scores.max()),
                "start": int(start),
                "end": int(end),
            }
            for (start, end), scores in zip(spans, row, strict=True)
            if end > start
        ]
        found.append({"tokens": tokens})
    return found


def _spans(
    answerer: TextTasks, questions: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
) -> list[dict[str, Any]]:
    """The best span inside the context: start before end, at most 30 tokens."""
    found = []
    for index, question in enumerate(questions):
        if not question.pair:
            raise BadInput(
                "a question needs a context", advice="give --pair, or 'question' and 'context' in a .jsonl file"
            )
        inside = np.array([part == 1 for part in encoded["parts"][index]])
        start, end = (np.where(inside, softmax(outputs[name][index]), 0) for name in ("start_logits", "end_logits"))
        scores = np.triu(np.outer(start, end)) - np.triu(np.outer(start, end), 30)
        first, last = np.unravel_index(int(scores.argmax()), scores.shape)
        begin, finish = int(encoded["offset_mapping"][index][first][0]), int(encoded["offset_mapping"][index][last][1])
        found.append(
            {"answer": question.pair[begin:finish], "score": float(scores[first, last]), "start": begin, "end": finish}
        )
    return found


def _words(
    answerer: TextTasks, _: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
) -> list[dict[str, Any]]:
    mask = answerer.tokenizer.mask_token_id
    found = []
    for ids, row in zip(encoded["input_ids"], outputs["logits"], strict=True):
        places = np.flatnonzero(np.asarray(ids) == mask)
        if not len(places):
            raise BadInput(f"the text has no {answerer.tokenizer.mask_token} to fill")
        best = [[int(i) for i in np.argsort(-row[place], kind="stable")[:_TOP]] for place in places]
        masks = [
            [{"word": answerer.tokenizer.decode([i]).strip(), "score": float(softmax(row[place])[i])} for i in order]
            for place, order in zip(places, best, strict=True)
        ]
        found.append({"masks": masks})
    return found


def _choices(
    answerer: TextTasks, questions: Sequence[Question], __: Mapping[str, Any], outputs: Arrays
) -> list[dict[str, Any]]:
    scored = outputs["logits"] if answerer.raw else softmax(outputs["logits"])
    return [
        {
            "choice": int(row.argmax()),
            "text": question.choices[int(row.argmax())],
            "scores": [float(value) for value in row],
        }
        for question, row in zip(questions, scored, strict=True)
    ]


_OUTPUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "feature-extraction": {"last_hidden_state": ("batch", "tokens", "size")},
    "text-classification": {"logits": ("batch", "labels")},
    "token-classification": {"logits": ("batch", "tokens", "labels")},
    "question-answering": {"start_logits": ("batch", "tokens"), "end_logits": ("batch", "tokens")},
    "fill-mask": {"logits": ("batch", "tokens", "vocabulary")},
    "multiple-choice": {"logits": ("batch", "choices")},
}
"""Outputs by task, and the axes that they have there."""
_NEED_OFFSETS = frozenset({"token-classification", "question-answering"})
ANSWERS: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    "feature-extraction": _embeddings,
    "text-classification": _classes,
    "token-classification": _tags,
    "question-answering": _spans,
    "fill-mask": _words,
    "multiple-choice": _choices,
}
