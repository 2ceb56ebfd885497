"""Opening an engine for its task: text, images, speech or generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.answer_options import AnswerOptions, TaskOption
from planish.optimizer.inference.speech import SpeechTranscriber
from planish.optimizer.inference.task import OpenedFolder, Task
from planish.optimizer.inference.text_generation import TextGenerator
from planish.optimizer.inference.text_tasks import TEXT_FUNCTIONS, TextTasks
from planish.optimizer.inference.vision import IMAGE_FUNCTIONS, ImageTasks
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import SIGNALS, Role, Signature, TensorSpec
from planish.optimizer.output.manifest import Manifest, digest_of, engine_folder, refuse_links_of, target_at
from planish.optimizer.runtime.tokenization import LIGHT_TASKS, LightTokenizer
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.staging import MANIFEST


class InputKind(Enum):
    """The kind of a request: a text, which a tokenizer encodes, or arrays, which a processor has made before."""

    TEXT = "text"
    ARRAYS = "arrays"


GENERATION = "generation"
"""Instead of a task in `TASKS`: an engine with a cache generates, whatever task an ONNX file was said to serve."""

TASKS: Mapping[tuple[InputKind, str], type[Task]] = {
    **{(InputKind.TEXT, task): TextTasks for task in TEXT_FUNCTIONS},
    **{(InputKind.ARRAYS, task): ImageTasks for task in IMAGE_FUNCTIONS},
    (InputKind.TEXT, GENERATION): TextGenerator,
    (InputKind.ARRAYS, GENERATION): SpeechTranscriber,
}
"""The class that opens an engine, by the kind of its inputs and its task."""

_SCORED = sorted(
    [task for task, function in TEXT_FUNCTIONS.items() if TaskOption.LOGITS in function.options]
    + [task for task, function in IMAGE_FUNCTIONS.items() if TaskOption.LOGITS in function.options]
)
"""Tasks whose answers have a score for each label or choice."""

T = TypeVar("T", bound=Task)


def open_task(path: Path, target: str | None = None, engine: Engine | None = None) -> Task:
    """Open an output (its first engine that runs here, or ``target``'s) or an engine folder, with its tokenizer.

    BadInput if nothing but arrays can be made of its outputs.
    """
    folder, target = engine_at(path, target)
    manifest = Manifest.read(folder.parent) if (folder.parent / MANIFEST).is_file() else None
    tokenizer = _tokenizer(folder, manifest)
    signatures = [] if manifest is None else [record.signature() for record in manifest.signatures.values()]
    config = _json(folder / "config.json")
    task = manifest.task if manifest is not None else _task(config, folder)
    generates = any(signature.cached for signature in signatures)
    if not generates:
        engine = engine or registry.backend(target).open(folder)
        signatures = signatures or [Signature(engine.inputs, engine.outputs)]
    kind = InputKind.ARRAYS if takes_arrays(signatures[0].inputs) else InputKind.TEXT
    if kind is InputKind.TEXT and tokenizer is None:
        raise BadInput(
            "this engine has no tokenizer", where=folder, advice="run it from Python with arrays: engine.run({…})"
        )
    task_class = TASKS.get((kind, GENERATION if generates else task))
    if task_class is None:
        raise BadInput(
            f"answers of task {task!r} are arrays", where=folder, advice="run it from Python: engine.run({…})"
        )
    return task_class.open(OpenedFolder(folder, target, task, signatures, config, tokenizer, manifest, engine))


def with_options(task: T, options: AnswerOptions) -> T:
    """The same task with the options that a user asks for; UsageError for the first that the task does not take."""
    if options.prompt is not None and TaskOption.PROMPT not in task.options:
        raise UsageError("only texts that are embedded have prompts by name", where="--prompt", advice="leave it out")
    changed = replace(task, asked=options)  # refuses the name of a prompt that the checkpoint does not have
    if options.logits and TaskOption.LOGITS not in task.options:
        raise UsageError(
            f"answers of task {task.name!r} have no logits",
            where="--logits",
            advice=f"leave it out: it is for {', '.join(_SCORED)}",
        )
    if options.for_generation and TaskOption.GENERATION not in task.options:
        raise UsageError("this engine does not go on with a text", advice="leave out max_new_tokens and sampling")
    return changed


def takes_arrays(inputs: Sequence[TensorSpec]) -> bool:
    """True if a component takes pixels or spectra, and no tokens."""
    roles = {tensor.role for tensor in inputs}
    return bool(roles & SIGNALS) and Role.TOKENS not in roles


def _tokenizer(folder: Path, manifest: Manifest | None) -> Any | None:
    """The tokenizer of an engine folder, None if it has none; without transformers where a build found no difference.

    That holds as long as the files are those that the build wrote.
    """
    if manifest is not None and manifest.tokenizer is not None and manifest.task in LIGHT_TASKS:
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
        if all(digest_of(folder / name) == manifest.files.get(f"{folder.name}/{name}") for name in names):
            return LightTokenizer(folder, manifest.tokenizer)
    from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def engine_at(path: Path, target: str | None) -> tuple[Path, str]:
    """The folder of an engine of an output (the first that runs here, or ``target``'s), and its target."""
    if not (path / MANIFEST).is_file():
        if path.is_file():
            raise BadInput("this is a file", where=path, advice="give its folder: the tokenizer lies there as well")
        refuse_links_of(path)
        return path, target or target_at(path)
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
