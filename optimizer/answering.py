"""An engine's answers, by task: texts in, labels, embeddings, spans or words out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from planish.optimizer import registry
from planish.optimizer.backend import Arrays, Engine
from planish.optimizer.benching import target_of
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.fitting import Room
from planish.optimizer.json_files import read_object
from planish.optimizer.manifest import Manifest, digest_of, engine_folder, refuse_links_of
from planish.optimizer.output import MANIFEST
from planish.optimizer.perceiving import (
    Perceiver,
    classes,
    label,
    perceiver,
    projected,
    softmax,
    takes_arrays,
    transcriber,
)
from planish.optimizer.program import Signature
from planish.optimizer.questions import Question, read_questions
from planish.optimizer.sentence_modules import SentenceModules, read_modules
from planish.optimizer.tokenizing import ENDLESS, LIGHT_TASKS, LightTokenizer, encode, length_limit
from planish.optimizer.writing import Writer, open_writer

_TOP = 5


@dataclass
class Answerer:
    """An opened engine with its tokenizer, for one task."""

    engine: Engine
    tokenizer: Any
    task: str
    config: Mapping[str, Any]
    folder: Path
    longest: int | None
    """Most tokens of one text; longer ones are cut, and the answer says so."""
    room: Room = field(default_factory=Room)
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
        found = _ANSWERS[self.task](self, questions, encoded, outputs)
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


AnyAnswerer: TypeAlias = Answerer | Perceiver | Writer
HAVE_LOGITS = frozenset({"text-classification", "token-classification", "multiple-choice", "image-classification"})
"""Tasks whose answers have a score for each label or choice."""


def with_prompt(answerer: AnyAnswerer, name: str) -> AnyAnswerer:
    """The same with a prompt of the checkpoint's before each text; UsageError if there is none of this name."""
    if not isinstance(answerer, Answerer) or answerer.task != "feature-extraction":
        raise UsageError("only texts that are embedded have prompts by name", where="--prompt", advice="leave it out")
    return replace(answerer, prompt=answerer.modules.prompt(name))


def with_raw_scores(answerer: AnyAnswerer) -> AnyAnswerer:
    """The same, with logits for scores; UsageError if its answers have no scores of labels or choices."""
    if isinstance(answerer, Writer) or answerer.task not in HAVE_LOGITS:
        raise UsageError(
            f"answers of task {answerer.task!r} have no logits",
            where="--logits",
            advice=f"leave it out: it is for {', '.join(sorted(HAVE_LOGITS))}",
        )
    return replace(answerer, raw=True)


def open_answerer(path: Path, target: str | None = None, engine: Engine | None = None) -> AnyAnswerer:
    """Open an output (its first engine that runs here, or ``target``'s) or an engine folder, with its tokenizer.

    What opens is a `Writer` where the task is to generate (a `Transcriber` if it hears), and a `Perceiver` for images.
    """
    folder, text = engine_at(path, target)
    manifest = Manifest.read(folder.parent) if (folder.parent / MANIFEST).is_file() else None
    tokenizer = _tokenizer(folder, manifest)
    signatures = [] if manifest is None else [record.signature() for record in manifest.signatures.values()]
    config = _json(folder / "config.json")
    task = manifest.task if manifest is not None else _task(config, folder)
    if manifest is not None and any(signature.cached for signature in signatures):
        return _open_writer(folder, text, manifest, signatures[0], tokenizer)
    engine = engine or registry.backend(text).open(folder)
    signature = signatures[0] if signatures else Signature(engine.inputs, engine.outputs)
    if takes_arrays(signature.inputs):
        return perceiver(engine, signature, task, config, folder)
    if tokenizer is None:
        raise _no_tokenizer(folder)
    if task not in _ANSWERS:
        raise BadInput(
            f"answers of task {task!r} are arrays", where=folder, advice="run it from Python: engine.run({…})"
        )
    modules = read_modules(folder) if task == "feature-extraction" else SentenceModules()
    longest = _longest(manifest, tokenizer, folder, modules.longest)
    room = Room.of(signature)
    return Answerer(
        engine, tokenizer, task, config, folder, longest, room, modules=modules, prompt=modules.prompt(None)
    )


def _tokenizer(folder: Path, manifest: Manifest | None) -> Any | None:
    """The tokenizer of an engine folder, None if it has none; without transformers where that is known to be the same.

    What a build found of the files holds as long as they are those that it wrote.
    """
    if manifest is not None and manifest.tokenizer is not None and manifest.task in LIGHT_TASKS:
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
        if all(digest_of(folder / name) == manifest.files.get(f"{folder.name}/{name}") for name in names):
            return LightTokenizer(folder, manifest.tokenizer)
    from planish.optimizer.lowering.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def _open_writer(folder: Path, target: str, manifest: Manifest, first: Signature, tokenizer: Any | None) -> Writer:
    """A writer for texts, or one that hears, which needs no tokenizer."""
    hears = takes_arrays(first.inputs)
    if tokenizer is None and not hears:
        raise _no_tokenizer(folder)
    writer = open_writer(folder, target, manifest, tokenizer)
    return transcriber(writer, first) if hears else writer


def _no_tokenizer(folder: Path) -> BadInput:
    return BadInput(
        "this engine has no tokenizer", where=folder, advice="run it from Python with arrays: engine.run({…})"
    )


def engine_at(path: Path, target: str | None) -> tuple[Path, str]:
    """The folder of an engine of an output (the first that runs here, or ``target``'s), and what opens it."""
    if not (path / MANIFEST).is_file():
        if path.is_file():
            raise BadInput("this is a file", where=path, advice="give its folder: the tokenizer lies there as well")
        refuse_links_of(path)
        return path, target or target_of(path)
    manifest = Manifest.read(path)
    names = [registry.backend(target).name] if target is not None else list(manifest.targets)
    for name in names:
        if name not in manifest.targets:
            raise BadInput(
                f"there is no engine for {name!r} here", where=path, advice=f"there are: {', '.join(manifest.targets)}"
            )
        if target is not None or manifest.backend(name).missing() is None:
            return engine_folder(path, name), target or manifest.targets[name].target
    return engine_folder(path, names[0]), manifest.targets[names[0]].target


def _json(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.is_file() else {}


def _task(config: Mapping[str, Any], folder: Path) -> str:
    from planish.optimizer.lowering.tasks import architecture_of, infer

    return infer(architecture_of(config) or "?", folder)


def _longest(manifest: Manifest | None, tokenizer: Any, folder: Path, asked: int | None) -> int | None:
    axes = {} if manifest is None else next(iter(manifest.signatures.values())).axes
    limits = [axes["sequence"].maximum if "sequence" in axes else None, asked or length_limit(tokenizer, folder)]
    return min((int(limit) for limit in limits if limit is not None and limit < ENDLESS), default=None)


def _embeddings(
    answerer: Answerer, _: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
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


def _classes(answerer: Answerer, _: Sequence[Question], __: Mapping[str, Any], outputs: Arrays) -> list[dict[str, Any]]:
    return classes(answerer.config, outputs, answerer.raw)


def _tags(
    answerer: Answerer, questions: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
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
    answerer: Answerer, questions: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
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
    answerer: Answerer, _: Sequence[Question], encoded: Mapping[str, Any], outputs: Arrays
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
    answerer: Answerer, questions: Sequence[Question], __: Mapping[str, Any], outputs: Arrays
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
_ANSWERS: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    "feature-extraction": _embeddings,
    "text-classification": _classes,
    "token-classification": _tags,
    "question-answering": _spans,
    "fill-mask": _words,
    "multiple-choice": _choices,
}
