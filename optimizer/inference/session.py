"""Opening an engine for its task: text, images, speech or generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.speech import transcriber
from planish.optimizer.inference.text_generation import TextGenerator, open_writer
from planish.optimizer.inference.text_tasks import ANSWERS, HAVE_LOGITS, TextTasks
from planish.optimizer.inference.vision import ImageTasks, perceiver, takes_arrays
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.interfaces.registry import target_of
from planish.optimizer.ir.program import Signature
from planish.optimizer.output.manifest import Manifest, digest_of, engine_folder, refuse_links_of
from planish.optimizer.runtime.batching import BatchLimits
from planish.optimizer.runtime.sentence_modules import SentenceModules, read_modules
from planish.optimizer.runtime.tokenization import ENDLESS, LIGHT_TASKS, LightTokenizer, length_limit
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.staging import MANIFEST

AnyTask: TypeAlias = TextTasks | ImageTasks | TextGenerator


def with_prompt(answerer: AnyTask, name: str) -> AnyTask:
    """The same with a prompt of the checkpoint's before each text; UsageError if there is none of this name."""
    if not isinstance(answerer, TextTasks) or answerer.task != "feature-extraction":
        raise UsageError("only texts that are embedded have prompts by name", where="--prompt", advice="leave it out")
    return replace(answerer, prompt=answerer.modules.prompt(name))


def with_raw_scores(answerer: AnyTask) -> AnyTask:
    """The same, with logits for scores; UsageError if its answers have no scores of labels or choices."""
    if isinstance(answerer, TextGenerator) or answerer.task not in HAVE_LOGITS:
        raise UsageError(
            f"answers of task {answerer.task!r} have no logits",
            where="--logits",
            advice=f"leave it out: it is for {', '.join(sorted(HAVE_LOGITS))}",
        )
    return replace(answerer, raw=True)


def open_task(path: Path, target: str | None = None, engine: Engine | None = None) -> AnyTask:
    """Open an output (its first engine that runs here, or ``target``'s) or an engine folder, with its tokenizer.

    Returns a `TextGenerator` where the task is to generate (a `SpeechTranscriber` if it takes recordings), and
    `ImageTasks` for images.
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
    if task not in ANSWERS:
        raise BadInput(
            f"answers of task {task!r} are arrays", where=folder, advice="run it from Python: engine.run({…})"
        )
    modules = read_modules(folder) if task == "feature-extraction" else SentenceModules()
    longest = _longest(manifest, tokenizer, folder, modules.longest)
    room = BatchLimits.of(signature)
    return TextTasks(
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
    from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def _open_writer(
    folder: Path, target: str, manifest: Manifest, first: Signature, tokenizer: Any | None
) -> TextGenerator:
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
    from planish.optimizer.lowering.components.tasks import architecture_of, infer

    return infer(architecture_of(config) or "?", folder)


def _longest(manifest: Manifest | None, tokenizer: Any, folder: Path, asked: int | None) -> int | None:
    axes = {} if manifest is None else next(iter(manifest.signatures.values())).axes
    limits = [axes["sequence"].maximum if "sequence" in axes else None, asked or length_limit(tokenizer, folder)]
    return min((int(limit) for limit in limits if limit is not None and limit < ENDLESS), default=None)
