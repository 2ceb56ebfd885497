"""Requirements of tasks: the class of head, the outputs, the axes of inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, get_args

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.interfaces.option_text import did_you_mean
from planish.optimizer.ir.program import Role, Signature


class Family(Enum):
    """Head and interface of models for a task."""

    ENCODER = "encoder"
    DECODER = "decoder with a cache"
    ENCODER_DECODER = "encoder, and decoder with a cache"


@dataclass(frozen=True)
class TaskSpec:
    """Outputs by name (of the ecosystem's loaders), their role, leading axes of the inputs, the family."""

    outputs: tuple[str, ...]
    role: Role = Role.LOGITS
    leading: tuple[str, ...] = ("batch",)
    family: Family = Family.ENCODER
    auto: str | None = None
    """The transformers class that selects the head, if several match the task."""


TASKS: Mapping[str, TaskSpec] = {
    "automatic-speech-recognition": TaskSpec(
        ("logits",), family=Family.ENCODER_DECODER, auto="AutoModelForSpeechSeq2Seq"
    ),
    "feature-extraction": TaskSpec(("last_hidden_state",), Role.HIDDEN),
    "fill-mask": TaskSpec(("logits",)),
    "image-classification": TaskSpec(("logits",)),
    "multiple-choice": TaskSpec(("logits",), leading=("batch", "choices")),
    "question-answering": TaskSpec(("start_logits", "end_logits")),
    "text-classification": TaskSpec(("logits",)),
    "text-generation": TaskSpec(("logits",), family=Family.DECODER),
    "text2text-generation": TaskSpec(("logits",), family=Family.ENCODER_DECODER),
    "token-classification": TaskSpec(("logits",)),
}
"""Tasks that can be lowered, by the names of optimum's taxonomy."""


INFERENCE = "inference"
"""Task of modules and graphs without a known task."""
_EMBEDDINGS = frozenset({"last_hidden_state", "pooler_output", "text_embeds", "image_embeds"})
"""Outputs of feature-extraction classes, which have one or more of them."""
_RANKS: Mapping[str, int] = {
    "fill-mask": 3, "image-classification": 2, "multiple-choice": 2, "question-answering": 2, "text-classification": 2,
    "token-classification": 3,
}  # fmt: skip
"""Number of axes of a task's outputs, where it distinguishes tasks."""


def misfit(task: str, kind: str, signatures: Mapping[str, Signature]) -> str | None:
    """The reason why components of these signatures, from this kind of source, do not fit a task; None if they fit.

    Inputs and outputs of checkpoints follow from the task; those of files and modules are arbitrary.
    """
    if task not in (*TASKS, INFERENCE):
        return f"there is no task {task!r}{did_you_mean(task, TASKS)}"
    spec = TASKS.get(task)
    if spec is None:
        return f"a checkpoint serves a task, not {task!r}" if kind == "checkpoint" else None
    outputs = {tensor.name: tensor for signature in signatures.values() for tensor in signature.outputs}
    absent = [name for name in spec.outputs if name not in outputs]
    if absent and not (task == "feature-extraction" and outputs.keys() & _EMBEDDINGS):
        return f"{task} needs an output {absent[0]!r}, the engine gives {', '.join(outputs)}"
    if kind != "checkpoint":
        return None
    cached = any(signature.cached for signature in signatures.values())
    family = Family.ENCODER_DECODER if len(signatures) > 1 else Family.DECODER if cached else Family.ENCODER
    if family is not spec.family:
        return f"{task} is served by an {spec.family.value}, the engine is an {family.value}"
    ranks = [len(outputs[name].shape) for name in spec.outputs if name in outputs]
    if task in _RANKS and any(rank != _RANKS[task] for rank in ranks):
        return f"{task} needs outputs of {_RANKS[task]} axes, the engine gives {', '.join(map(str, ranks))}"
    tokens = [t for t in next(iter(signatures.values())).inputs if t.role is Role.TOKENS]
    if any(len(tensor.shape) != len(spec.leading) + 1 for tensor in tokens):
        return f"{task} takes tokens by {', '.join(spec.leading)}, the engine takes others"
    return None


_NAMED: Mapping[str, str] = {
    "EncoderModel": "feature-extraction",
    "TextModel": "feature-extraction",
    "VisionModel": "feature-extraction",
    "WithProjection": "feature-extraction",
    "ContextEncoder": "feature-extraction",
    "QuestionEncoder": "feature-extraction",
    "ForNextSentencePrediction": "text-classification",
    "DPRReader": "question-answering",
}
"""Tasks by suffix of class names that are not in the taxonomy."""


def resolve(name: str) -> str:
    """The name of a task, with synonyms resolved; UsageError if it cannot be lowered."""
    from optimum.exporters.tasks import TasksManager

    task = str(TasksManager.map_from_synonym(name)).removesuffix("-with-past")
    if task not in TASKS:
        raise UsageError(f"unknown task {name!r}{did_you_mean(name, TASKS)}", where="--task")
    return task


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first class in a configuration, or None."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def infer(architecture: str, where: object) -> str:
    """The task of a model class by its name; BadInput with the advice `--task` if the name is ambiguous."""
    from optimum.exporters.tasks import TasksManager

    tables: Mapping[str, Mapping[str, Any]] = TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS
    for task, classes in sorted(tables.items()):
        if task in TASKS and architecture in _names(classes):
            return task
    ending = next((ending for ending in _NAMED if architecture.endswith(ending)), None)
    if ending is not None and _named_class(architecture) is not None:
        return _NAMED[ending]
    other = next((task for task, classes in sorted(tables.items()) if architecture in _names(classes)), None)
    advice = f"say which of {', '.join(TASKS)} it shall serve with --task"
    if other is not None:
        raise BadInput(f"{architecture} serves {other}, which this version does not lower", where=where, advice=advice)
    outputs = _outputs_of(_named_class(architecture))
    gives = f", which gives {', '.join(outputs)}," if outputs else ""
    raise BadInput(f"the class {architecture!r}{gives} does not tell its task", where=where, advice=advice)


def _outputs_of(model_class: Any) -> list[str]:
    """The outputs that the forward method of a class declares beyond the common ones; empty if it declares none."""
    hint = inspect.signature(model_class.forward).return_annotation if model_class is not None else None
    declared = next((part for part in (*get_args(hint), hint) if is_dataclass(part)), None)
    names = [] if declared is None else [field.name for field in fields(declared)]
    return [name for name in names if name not in _USUAL and not name.endswith("loss")]


_USUAL = frozenset({"hidden_states", "attentions", "past_key_values", "cross_attentions"})
"""Outputs that depend on flags, or belong to a cache."""


def _named_class(architecture: str | None) -> Any:
    """The model class of transformers with this name, or None."""
    import transformers

    named: Any = getattr(transformers, architecture or "", None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model and named.config_class is not None else None


def is_in_no_table(architecture: str, task: str) -> bool:
    """True if a class is lowered with all its outputs, since its task does not define them."""
    from optimum.exporters.tasks import TasksManager

    table: Mapping[str, Any] = TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS[task]
    return architecture.endswith(tuple(_NAMED)) and architecture not in _names(table)


def _names(classes: Mapping[str, Any]) -> set[str]:
    """Class names in a table whose values are names or tuples of names."""
    return {name for value in classes.values() for name in ([value] if isinstance(value, str) else value)}


def head_class(task: str, config: Any, architecture: str | None, where: object) -> type[Any]:
    """The model class for ``task`` and ``config``: the configuration's own class if it serves the task.

    BadInput if the architecture has no such head.
    """
    from optimum.exporters.tasks import TasksManager

    auto = TasksManager.get_model_class_for_task(task, model_class_name=TASKS[task].auto)
    listed = auto._model_mapping.get(type(config), ())
    candidates = list(listed) if isinstance(listed, tuple | list) else [listed]
    named = next((candidate for candidate in candidates if candidate.__name__ == architecture), None)
    if named is None and task in (served for ending, served in _NAMED.items() if str(architecture).endswith(ending)):
        other = _named_class(architecture)
        named = other if other is not None and isinstance(config, other.config_class) else None
    if named is None and not candidates:
        raise BadInput(
            f"{architecture or config.model_type} has no head for {task} in this version of transformers", where=where
        )
    chosen: type[Any] = named or candidates[0]
    return chosen
