"""A Hugging Face checkpoint folder: validated as data, built on the meta device, with weights as references."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.lowering.checkpoint import adapter as adapter_files
from planish.optimizer.lowering.checkpoint.failures import told_as_bad_input
from planish.optimizer.lowering.checkpoint.merged_weights import Assembly
from planish.optimizer.lowering.checkpoint.quantized_weights import Quantized, float_weights, scheme, without_codes
from planish.optimizer.lowering.checkpoint.size_limits import bounded, check_counts
from planish.optimizer.lowering.checkpoint.weights import Stored, Weight, read_index, weight_files
from planish.optimizer.lowering.components import tasks
from planish.optimizer.runtime.sentence_modules import module_files, read_modules
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.links import file_in

_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})
_ATTENTION_KEYS = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})
_EXPERTS = "batched_mm"
"""Implementation of experts while tracing: the only one without data-dependent loops."""
_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model",
    "generation_config.json", "chat_template.jinja", "source.spm", "target.spm", "preprocessor_config.json",
)  # fmt: skip
"""Settings files that are copied beside an engine."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with validated files, and its task."""

    folder: Path
    config: Any
    architecture: str | None
    task: str
    weights: Mapping[str, Weight]
    adapter: Path | None = None
    """The folder of a PEFT adapter that is merged into the weights."""
    last_logits: bool = False
    """True if a decoder gives the scores after the last token only."""

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the configuration and of each weight file, with those of an adapter."""
        files = [self.folder / "config.json", *weight_files(self.folder)]
        adapted = [] if self.adapter is None else [self.adapter / name for name in adapter_files.FILES]
        return {file.name: sha256(file) for file in (*files, *adapted)}

    def companions(self) -> list[Path]:
        """Files that are copied beside engines of this checkpoint, relative to the folder."""
        return companions_in(self.folder)


def companions_in(folder: Path) -> list[Path]:
    """Configuration and tokenizer files in a folder, relative to it; BadInput if one is a link to a place outside."""
    files = [*map(Path, ("config.json", *_TEXT_FILES)), *module_files(folder)]
    return [file for file in files if file_in(folder, file) is not None]


def open_checkpoint(
    folder: Path, task: str | None = None, adapter: Path | None = None, *, last_logits: bool = False
) -> Checkpoint:
    """Validate a folder (and that of an adapter) and read its configuration; nothing is executed or downloaded.

    BadInput for missing, broken or refused content, UsageError for an unknown task.
    """
    raw = _read_config(folder)
    _refuse_code(raw, folder / "config.json")
    _refuse_embedded_adapter(folder)
    companions_in(folder)  # links out of the folder are refused before anything is computed
    scheme(raw, folder)  # before anything is read or imported: half of them are refused
    weights = float_weights(raw, folder, read_index(folder))
    check_counts(raw, weights, folder / "config.json")
    config = _transformers_config(folder, raw)
    architecture = _architecture(raw, folder)
    if task is not None:
        task = tasks.resolve(task)
    elif architecture is None:
        raise BadInput(
            "config.json names no architecture, so the task is not known",
            where=folder,
            advice=f"say which of {', '.join(tasks.TASKS)} it shall serve with --task",
        )
    else:
        task = tasks.infer(architecture, folder)
    if task == "feature-extraction":
        read_modules(folder)  # a module that `run` would refuse is refused before anything is built
    if adapter is not None:
        adapter_files.read_adapter(adapter)
    if last_logits and tasks.TASKS[task].family is not tasks.Family.DECODER:
        raise UsageError(
            f"a model for {task} has no scores behind a last token", where="--logits last", advice="leave it out"
        )
    return Checkpoint(folder, config, architecture, task, weights, adapter, last_logits)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BadInput("there is no such folder", where=folder, advice="give a checkpoint folder or an .onnx file")
    path = file_in(folder, "config.json")
    if path is None:
        raise BadInput("there is no config.json", where=folder, advice="give the folder of a whole checkpoint")
    raw = read_object(path)
    if raw.get("transformers_weights") is not None:  # transformers would read others than we
        raise BadInput("it names the file of its weights itself (transformers_weights)", where=path)
    return raw


def _architecture(raw: Mapping[str, Any], folder: Path) -> str | None:
    """The first class in config.json."""
    listed = raw.get("architectures") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise BadInput(f"its architectures are no list of names but {listed!r}", where=folder / "config.json")
    return next(iter(listed), None)


def _refuse_embedded_adapter(folder: Path) -> None:
    """Raise BadInput if an adapter is in the folder itself: transformers would add it to the original."""
    if (folder / adapter_files.FILES[0]).is_file():
        raise BadInput(
            f"{adapter_files.FILES[0]} lies in the checkpoint's own folder",
            where=folder,
            advice="move the adapter's files to a folder of their own and give that as --adapter",
        )


def _refuse_code(raw: object, path: Path, trail: str = "") -> None:
    """Refuse settings that make a loader run code: remote classes, custom generation, kernels from a hub."""
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        here = f"{trail}{key}"
        remote_kernel = key in _ATTENTION_KEYS and isinstance(value, str) and re.search(r"[/:@|]", value)
        if (key in _CODE_KEYS and value) or remote_kernel:
            raise BadInput(
                f"{here!r} asks for code from outside this library, which is never run",
                where=path,
                advice="use a checkpoint of an architecture that transformers itself has",
            )
        _refuse_code(value, path, f"{here}.")


def _transformers_config(folder: Path, raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise BadInput("it names no model_type", where=folder / "config.json")
    path = folder / "config.json"
    with told_as_bad_input("transformers refuses it", path), quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except ValueError as error:
            if "does not recognize" in str(error):
                raise BadInput(f"transformers has no architecture {kind!r}", where=path) from None
            raise
        _refuse_unknown_rope(config, path)
    return without_codes(config)


def _refuse_unknown_rope(config: Any, path: Path) -> None:
    """Refuse a RoPE scaling that this version of transformers does not support."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Some models have one set of parameters per layer type, others one for all layers.
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    kinds = {part.get("rope_type", "default") for part in nested} - {"default", *ROPE_INIT_FUNCTIONS}
    if kinds:
        raise BadInput(
            f"transformers knows no rope_type {', '.join(map(repr, sorted(map(str, kinds))))}",
            where=path,
            advice=f"there are: {', '.join(sorted(ROPE_INIT_FUNCTIONS))}",
        )


def skeleton(checkpoint: Checkpoint, experts: str | None = _EXPERTS) -> Any:
    """The model with its parameters on the meta device and its buffers computed: structure without weights.

    ``experts`` is the implementation of experts; None is the default of transformers.
    """
    from accelerate import init_empty_weights

    cls = tasks.head_class(checkpoint.task, checkpoint.config, checkpoint.architecture, checkpoint.folder)
    with init_empty_weights(include_buffers=False), quiet():
        model = _from_config(cls, checkpoint)
    if experts is not None and getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation(experts)
    return model.eval()


def _from_config(cls: type[Any], checkpoint: Checkpoint) -> Any:
    import torch

    path = checkpoint.folder / "config.json"
    with told_as_bad_input(f"{cls.__name__} cannot be built from it", path), bounded(checkpoint.weights, path):
        return cls._from_config(checkpoint.config, dtype=torch.float32)


def loaded(checkpoint: Checkpoint) -> Any:
    """The model with its weights, in float32, as transformers itself loads it: the original for comparison."""
    import torch

    bind(skeleton(checkpoint, experts=None), checkpoint)  # refuses what would allocate more than the weights hold
    cls = tasks.head_class(checkpoint.task, checkpoint.config, checkpoint.architecture, checkpoint.folder)
    with told_as_bad_input(f"transformers cannot load it as {cls.__name__}", checkpoint.folder), quiet():
        model = cls.from_pretrained(
            None, config=checkpoint.config, state_dict=_tensors(checkpoint.weights), dtype=torch.float32
        ).eval()
        if model.can_generate() and hasattr(model, "adjust_generation_fn"):  # what is not done without a folder
            nothing = dict.fromkeys(("cache_dir", "force_download", "proxies", "token", "revision"))
            model.adjust_generation_fn(
                None, False, None, str(checkpoint.folder), **nothing, local_files_only=True, subfolder="",
                trust_remote_code=False,
            )  # fmt: skip
    if checkpoint.adapter is None:
        return model
    with quiet():
        return adapter_files.merged_original(model, checkpoint.adapter)


def _tensors(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Tensors by name for transformers to load: slices of files, and dequantized weights.

    From a folder, transformers finds files by its own, changing rules, and might read others than Planish does.
    """
    import torch
    from safetensors import safe_open

    paths = {weight.path for weight in weights.values() if isinstance(weight, Stored)}
    files: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in sorted(paths)}
    return {
        name: files[weight.path].get_slice(name) if isinstance(weight, Stored) else torch.from_numpy(weight.read())
        for name, weight in weights.items()
    }


@dataclass(frozen=True)
class Binding:
    """Storage of the parameters and buffers of a model."""

    stored: Mapping[str, Weight]
    absent: frozenset[str]
    """Parameters that the checkpoint lacks, such as a head that it was saved without."""

    def refuse_absent(self, used: Collection[str], model: Any, checkpoint: Checkpoint) -> None:
        """Raise BadInput if a parameter that is ``used`` has no weights."""
        missing = sorted(self.absent.intersection(used))
        if missing:
            raise BadInput(
                f"the checkpoint has no weights for {_some(missing)} of {type(model).__name__} ({checkpoint.task})",
                where=checkpoint.folder,
                advice="choose a --task that it was trained for, or a checkpoint with that head",
            )


def bind(model: Any, checkpoint: Checkpoint) -> Binding:
    """The stored tensor of each parameter and buffer of ``model``, by the renaming rules of transformers.

    BadInput if one has another shape. Parameters that transformers computes from the configuration (neither loaded nor
    missing) are in neither list: see `initial`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    bound: dict[str, Weight] = {}
    assembly = Assembly(converters, model)
    with told_as_bad_input(f"its tensors are not those of {type(model).__name__}", checkpoint.folder):
        for key, tensor in sorted(checkpoint.weights.items(), key=lambda item: dot_natural_key(item[0])):
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if target not in state and key in state:
                target, pattern = key, None
            if target in state and pattern is not None:
                assembly.add(target, key, pattern, tensor.widened())
            elif target in state:
                bound[target] = tensor.widened()
        bound |= {name: weight for name, weight in assembly.finish().items() if name in state}
    for name, weight in bound.items():
        path = name.rpartition(".")[0]
        if isinstance(weight, Quantized) and type(model.get_submodule(path)).__name__ == "Conv1D":
            raise BadInput(f"{path!r} stores its weight turned, which is not read quantized", where=checkpoint.folder)
    _follow_ties(model, bound)
    _check_shapes(state, bound, checkpoint)
    if checkpoint.adapter is not None:
        bound = adapter_files.merge_adapter(bound, checkpoint.adapter, model)
    return Binding(bound, _absent(model, bound))


def initial(model: Any, name: str) -> Any:
    """A parameter that no checkpoint holds, such as a table of sines, initialized by transformers."""
    import torch

    path, _, attribute = name.rpartition(".")
    parents = [model.get_submodule(".".join(path.split(".")[:depth])) for depth in range(path.count(".") + 2)]
    maker = next(parent for parent in reversed(parents) if hasattr(parent, "_init_weights"))
    module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu", recurse=False)
    with torch.no_grad(), quiet():
        maker._init_weights(module)
    return module.get_parameter(attribute).detach()


def _follow_ties(model: Any, bound: dict[str, Weight]) -> None:
    """Share the tensor of a tied parameter with the parameter that the file lacks."""
    for target, source in model.all_tied_weights_keys.items():
        for name, other in ((target, source), (source, target)):
            if name not in bound and other in bound:
                bound[name] = bound[other]


def _absent(model: Any, bound: Mapping[str, Weight]) -> frozenset[str]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignorable = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return frozenset(
        name for name in parameters - bound.keys() if not any(pattern.search(name) for pattern in ignorable)
    )


def _check_shapes(state: Mapping[str, Any], bound: Mapping[str, Weight], checkpoint: Checkpoint) -> None:
    for name, tensor in bound.items():
        if name in state and state[name].is_floating_point() and tensor.dtype is not ir.DataType.FLOAT:
            raise BadInput(
                f"{name!r} holds {tensor.dtype.name}, config.json describes a model of floats",
                where=checkpoint.folder,
                advice="give the float checkpoint that it was made of",
            )
        if name in state and tuple(state[name].shape) != tensor.stored_shape:
            raise BadInput(
                f"{name!r} has shape {list(tensor.stored_shape)}, config.json describes {list(state[name].shape)}",
                where=checkpoint.folder,
                advice="config.json and the weights are of different models",
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and messages of the libraries on the terminal."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnxscript.version_converter")
    levels = {name: logging.getLogger(name).level for name in names}
    library.set_verbosity_error()
    library.disable_progress_bar()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
        for name, old in levels.items():
            logging.getLogger(name).setLevel(old)


def tensors_of(bound: Mapping[str, Weight]) -> dict[str, ir.TensorProtocol]:
    """Lazy ONNX tensors by parameter name."""
    return {name: stored.tensor(name) for name, stored in bound.items()}
