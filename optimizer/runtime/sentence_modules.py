"""The modules of a sentence-transformers folder: how hidden states become an embedding.

`modules.json` names a chain: Transformer, Pooling, and behind it any of Dense, LayerNorm, Normalize (Reimers and
Gurevych 2019; the files are those of sentence-transformers 2 to 5). The engine is the Transformer; the others are
small and are computed in numpy (`sentence_layers`). A module or an option that this file does not know is refused by
name: a dropped layer gives vectors that look right and are not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from planish.optimizer.errors import BadInput, UsageError, first_fault
from planish.optimizer.runtime.sentence_layers import (
    ACTIVATIONS,
    POOLINGS,
    Dense,
    LayerNorm,
    Normalize,
    TokenStates,
    VectorLayer,
)
from planish.optimizer.system.json_files import read_json, read_object

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_TRANSFORMER = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where the options of the Transformer stand: in the first that is there (older versions named it by the model)."""
_WEIGHTS = "model.safetensors"
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of one mode each, in the order in which sentence-transformers joins the vectors of several."""


class _Config(BaseModel):
    """The configuration of a module; what sentence-transformers writes beside it and we do not need is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _ModuleEntry(_Config):
    path: str = ""
    type: str


class _PoolingConfig(_Config):
    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False
    include_prompt: bool = True

    def modes(self) -> list[str]:
        """The modes in the order in which their vectors are joined; the mean if none is named."""
        if self.pooling_mode is not None:
            return [self.pooling_mode] if isinstance(self.pooling_mode, str) else self.pooling_mode
        return [mode for flag, mode in _LEGACY_MODES.items() if getattr(self, flag)] or ["mean"]


class _DenseConfig(_Config):
    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: str = "sentence_embedding"
    module_output_name: str | None = None
    use_residual: bool = False


class _LayerNormConfig(_Config):
    dimension: int


class _SentenceConfig(_Config):
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


class _TransformerConfig(_Config):
    max_seq_length: int | None = None
    do_lower_case: bool = False
    module_output_name: str | None = None


C = TypeVar("C", bound=_Config)


def _validated(kind: type[C], value: object, where: Path) -> C:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise BadInput(first_fault(error), where=where) from None


def _read(kind: type[C], path: Path) -> C:
    """The configuration in a file, its defaults if there is no file."""
    return _validated(kind, read_object(path) if path.is_file() else {}, path)


@dataclass(frozen=True)
class SentenceModules:
    """The preparation of texts for the engine, and the pooling and layers behind its hidden states."""

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    layers: tuple[VectorLayer, ...] = ()
    longest: int | None = None
    """`max_seq_length`: takes the place of the tokenizer's own limit."""
    lower_case: bool = False
    stripped: bool = False
    """True if blanks around a text are removed, as sentence-transformers does."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def prompt(self, name: str | None) -> str:
        """The text of a prompt by its name, else of the default one; UsageError if no prompt has this name."""
        if name is not None and name not in self.prompts:
            there = f"there are: {', '.join(self.prompts)}" if self.prompts else f"{SETTINGS} has none"
            raise UsageError(f"this model has no prompt {name!r}", where="--prompt", advice=there)
        return self.prompts.get(name or self.default_prompt or "", "")

    def prepared(self, text: str, prompt: str) -> str:
        """A text as the tokenizer gets it."""
        text = (prompt + text).strip() if self.stripped else prompt + text
        return text.lower() if self.lower_case else text

    def prompt_length(self, prompt: str, tokens: Callable[[str], Sequence[int]], special: Container[int]) -> int:
        """Number of tokens at the beginning of each text that are not pooled."""
        if self.include_prompt or not prompt:
            return 0
        ids = list(tokens(self.prepared(prompt, "")))
        return len(ids) - (ids[-1:] != [] and ids[-1] in special)  # the end of the text comes later

    def embed(self, hidden: np.ndarray, mask: np.ndarray, prompt_length: int = 0) -> np.ndarray:
        """Embeddings (batch, size) of hidden states (batch, tokens, size) behind a mask (batch, tokens)."""
        kept = np.where(np.cumsum(mask != 0, axis=1) > prompt_length, mask, 0)
        states = TokenStates(hidden, mask, kept)
        vectors = np.concatenate([POOLINGS[mode](states) for mode in self.modes], axis=-1)
        for layer in self.layers:
            vectors = layer.apply(vectors)
        return np.asarray(vectors, hidden.dtype)


def read_modules(folder: Path) -> SentenceModules:
    """The modules of a folder; a mean of the tokens if it is not one of sentence-transformers.

    BadInput names the module or the option that is not supported, a broken file, or a path that leaves the folder.
    """
    if not (folder / MODULES).is_file():
        legacy = folder / "1_Pooling" / "config.json"
        return SentenceModules() if not legacy.is_file() else _pooling_of(_read(_PoolingConfig, legacy), legacy)
    listed = listed_modules(folder)
    kinds = [kind for kind, _ in listed if kind != "Dropout"]  # does nothing once a model is trained
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") != 1 or kinds.count("Transformer") != 1:
        raise BadInput(
            f"the modules {' > '.join(kinds)} are not supported",
            where=folder / MODULES,
            advice="they must be a Transformer, one Pooling, and any Dense, LayerNorm and Normalize behind it",
        )
    pooling = next(path for kind, path in listed if kind == "Pooling") / "config.json"
    options = _read(
        _TransformerConfig, next((folder / n for n in _TRANSFORMER if (folder / n).is_file()), folder / _TRANSFORMER[0])
    )
    if options.module_output_name not in (None, "token_embeddings"):
        raise _unsupported(f"its output {options.module_output_name!r}", folder / _TRANSFORMER[0])
    if options.max_seq_length is not None and options.max_seq_length < 1:
        raise BadInput(f"max_seq_length is {options.max_seq_length}", where=folder / _TRANSFORMER[0])
    settings = _read(_SentenceConfig, folder / SETTINGS)
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.prompts:
        raise BadInput(f"default_prompt_name {settings.default_prompt_name!r} is not a prompt", where=folder / SETTINGS)
    if not pooling.is_file():
        raise BadInput("this file is not there", where=pooling, advice=f"{MODULES} names it")
    pooled = _pooling_of(_read(_PoolingConfig, pooling), pooling)
    return SentenceModules(
        pooled.modes,
        pooled.include_prompt,
        tuple(_READERS[kind](path) for kind, path in listed if kind in _READERS),
        options.max_seq_length,
        options.do_lower_case,
        stripped=True,
        prompts=settings.prompts,
        default_prompt=settings.default_prompt_name,
    )


def listed_modules(folder: Path) -> list[tuple[str, Path]]:
    """Class name and folder of each module that modules.json names.

    BadInput for a class that is not supported, or a path that leads outside of ``folder``.
    """
    where = folder / MODULES
    listed = read_json(where)
    if not isinstance(listed, list) or not listed:
        raise BadInput("this holds no list of modules", where=where)
    modules = []
    for module in [_validated(_ModuleEntry, part, where) for part in listed]:
        library, _, kind = module.type.rpartition(".")
        supported = ("Transformer", "Pooling", "Dropout", *_READERS)
        if library.split(".")[0] != "sentence_transformers" or kind not in supported:
            raise BadInput(
                f"the module {module.type!r} is not supported",
                where=where,
                advice=f"supported are {', '.join(supported)} of sentence_transformers; --task fill-mask or an .onnx "
                "file needs none of them",
            )
        path = PurePosixPath(module.path)
        if path.is_absolute() or ".." in path.parts or "\0" in module.path:
            raise BadInput(f"the path {module.path!r} leads outside of this folder", where=where)
        if kind == "Transformer" and path.parts:
            raise BadInput(
                f"its Transformer is in {module.path!r}, not beside {MODULES}",
                where=where,
                advice="move that folder's files here and set its path to ''",
            )
        modules.append((kind, folder / path))
    return modules


def module_files(folder: Path) -> list[Path]:
    """Files of the modules that are there, relative to ``folder``: they travel with an engine.

    None of a folder whose modules are not supported: an engine for another task does not need them.
    """
    shared = [Path(name) for name in (*_TRANSFORMER, SETTINGS)]
    if not (folder / MODULES).is_file():
        paths = [Path("1_Pooling/config.json")]
    else:
        try:
            listed = listed_modules(folder)
        except BadInput:  # `read_modules` says so where the modules are needed
            return []
        paths = [
            path.relative_to(folder) / n for kind, path in listed if path != folder for n in ("config.json", _WEIGHTS)
        ]
        shared.append(Path(MODULES))
    return [path for path in (*shared, *dict.fromkeys(paths)) if (folder / path).is_file()]


def _pooling_of(config: _PoolingConfig, where: Path) -> SentenceModules:
    modes = config.modes()
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown or not modes:
        raise _unsupported(f"the pooling {', '.join(map(repr, unknown)) or 'of nothing'}", where, POOLINGS)
    return SentenceModules(tuple(modes), config.include_prompt)


def _unsupported(what: str, where: Path, supported: Sequence[str] | Mapping[str, Any] = ()) -> BadInput:
    advice = f"there are: {', '.join(supported)}" if supported else None
    return BadInput(f"{what} is not supported", where=where, advice=advice)


def _dense(folder: Path) -> Dense:
    where = folder / "config.json"
    config = _read(_DenseConfig, where)
    library, _, activation = config.activation_function.rpartition(".")
    if library.split(".")[0] != "torch" or activation not in ACTIVATIONS:
        raise _unsupported(f"the activation {config.activation_function!r}", where, ACTIVATIONS)
    ends = (config.module_input_name, config.module_output_name or config.module_input_name)
    if ends != ("sentence_embedding", "sentence_embedding"):
        raise _unsupported(f"a Dense module from {ends[0]!r} to {ends[1]!r}", where)
    tensors = _tensors(folder)
    size = (config.out_features, config.in_features)
    residual: np.ndarray | bool = config.use_residual
    if config.use_residual and config.in_features != config.out_features:
        residual = _tensor(tensors, "residual.weight", size, folder)
    bias = _tensor(tensors, "linear.bias", size[:1], folder) if config.bias else None
    return Dense(_tensor(tensors, "linear.weight", size, folder), bias, activation, residual)


def _layer_norm(folder: Path) -> LayerNorm:
    size = (_read(_LayerNormConfig, folder / "config.json").dimension,)
    tensors = _tensors(folder)
    return LayerNorm(*(_tensor(tensors, f"norm.{name}", size, folder) for name in ("weight", "bias")))


_READERS: Mapping[str, Callable[[Path], VectorLayer]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": lambda _: Normalize(),
}


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a module in float32. A pickle is not read: it can run code."""
    import ml_dtypes
    from safetensors import SafetensorError, deserialize

    path = folder / _WEIGHTS
    if not path.is_file():
        pickled = (folder / "pytorch_model.bin").is_file()
        raise BadInput(
            f"there is no {_WEIGHTS}" + (", only a pickle (pytorch_model.bin), which is never read" if pickled else ""),
            where=folder,
            advice="save the model again with a sentence-transformers of 2023 or later",
        )
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    try:
        stored: list[tuple[str, Any]] = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BadInput(f"this is not a safetensors file ({error})", where=path) from None
    for name, tensor in stored:
        if tensor["dtype"] not in kinds:
            raise BadInput(f"{name!r} is of type {tensor['dtype']}, not real", where=path)
    return {
        name: np.frombuffer(tensor["data"], kinds[tensor["dtype"]]).reshape(tensor["shape"]).astype(np.float32)
        for name, tensor in stored
    }


def _tensor(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    if name not in tensors or tensors[name].shape != shape:
        given = f"has shape {list(tensors[name].shape)}" if name in tensors else "is not there"
        raise BadInput(f"{name!r} {given}, config.json describes {list(shape)}", where=folder / _WEIGHTS)
    return tensors[name]
