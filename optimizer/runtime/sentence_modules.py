"""The modules of a sentence-transformers folder: what is made of hidden states before they are an embedding.

`modules.json` names a chain: Transformer, Pooling, and behind it any of Dense, LayerNorm, Normalize (Reimers and
Gurevych 2019; the files are those of sentence-transformers 2 to 5). The engine is the Transformer; the others are
small and are computed here in numpy. A module or an option that this file does not know is refused by name: a
dropped layer gives vectors that look right and are not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from planish.optimizer.errors import BadInput, UsageError, first_fault
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


@dataclass(frozen=True)
class Tokens:
    """Hidden states (batch, tokens, size), their ``mask`` (batch, tokens), and ``kept``: the mask without a prompt."""

    hidden: np.ndarray
    mask: np.ndarray
    kept: np.ndarray


def _cls(tokens: Tokens) -> np.ndarray:
    first = (tokens.mask != 0).argmax(axis=1)  # behind padding on the left
    return np.asarray(tokens.hidden[np.arange(len(first)), first])


def _last(tokens: Tokens) -> np.ndarray:
    last = tokens.mask.shape[1] - 1 - (tokens.mask[:, ::-1] != 0).argmax(axis=1)
    return np.asarray(tokens.hidden[np.arange(len(last)), last])


def _max(tokens: Tokens) -> np.ndarray:
    return np.asarray(np.where(tokens.kept[..., None] != 0, tokens.hidden, -np.inf).max(axis=1))


def _mean(tokens: Tokens, weights: np.ndarray | None = None, power: float = 1.0) -> np.ndarray:
    weighted = (tokens.kept if weights is None else tokens.kept * weights).astype(tokens.hidden.dtype)
    total = np.maximum(weighted.sum(axis=1, keepdims=True), 1e-9)
    return np.asarray(np.einsum("bth,bt->bh", tokens.hidden, weighted) / total**power)


def _weighted_mean(tokens: Tokens) -> np.ndarray:
    """A token weighs as much as its place in its own text (Muennighoff 2022): padding in front is not counted."""
    return _mean(tokens, np.cumsum(tokens.mask != 0, axis=1))


_POOLED: Mapping[str, Callable[[Tokens], np.ndarray]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda tokens: _mean(tokens, power=0.5),
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def _gelu(values: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return np.asarray(values * 0.5 * (1 + erf(values / np.sqrt(2))))


def _logistic(values: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(values))


_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "GELU": _gelu,
    "Identity": np.asarray,
    "ReLU": lambda values: np.maximum(values, 0),
    "SiLU": lambda values: values * _logistic(values),
    "Sigmoid": _logistic,
    "Tanh": np.tanh,
}


class _Config(BaseModel):
    """The configuration of a module; what sentence-transformers writes beside it and we do not need is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Listed(_Config):
    path: str = ""
    type: str


class _Pooling(_Config):
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


class _Dense(_Config):
    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: str = "sentence_embedding"
    module_output_name: str | None = None
    use_residual: bool = False


class _LayerNorm(_Config):
    dimension: int


class _Settings(_Config):
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


class _Options(_Config):
    max_seq_length: int | None = None
    do_lower_case: bool = False
    module_output_name: str | None = None


C = TypeVar("C", bound=_Config)


def _checked(kind: type[C], value: object, where: Path) -> C:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise BadInput(first_fault(error), where=where) from None


def _read(kind: type[C], path: Path) -> C:
    """The configuration in a file, its defaults if there is no file."""
    return _checked(kind, read_object(path) if path.is_file() else {}, path)


class Step(Protocol):
    """One module behind the pooling: vectors (batch, size) in and out."""

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors that the module makes of others."""


@dataclass(frozen=True)
class Normalize:
    """Vectors of length one."""

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Divide each vector by its norm."""
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


@dataclass(frozen=True)
class Dense:
    """A linear map, its activation, and the input once more where the module is residual."""

    weight: np.ndarray
    bias: np.ndarray | None
    activation: str
    residual: np.ndarray | bool = False
    """The map of the input that is added; True: the input itself."""

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Map, activate, and add the input where the module is residual."""
        mapped = vectors @ self.weight.T + (0 if self.bias is None else self.bias)
        mapped = _ACTIVATIONS[self.activation](mapped)
        if isinstance(self.residual, np.ndarray):
            return np.asarray(mapped + vectors @ self.residual.T)
        return np.asarray(mapped + vectors if self.residual else mapped)


@dataclass(frozen=True)
class LayerNorm:
    """Vectors of mean zero and variance one, scaled and moved."""

    weight: np.ndarray
    bias: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Normalize, scale and move each vector."""
        centred = vectors - vectors.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + 1e-5) * self.weight + self.bias)


@dataclass(frozen=True)
class SentenceModules:
    """How texts are prepared for the engine, and what is made of its hidden states."""

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()
    longest: int | None = None
    """`max_seq_length`: takes the place of the tokenizer's own limit."""
    lower_case: bool = False
    stripped: bool = False
    """Whether blanks around a text are taken away, as sentence-transformers does."""
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
        """How many tokens at the beginning of each text are not pooled."""
        if self.include_prompt or not prompt:
            return 0
        ids = list(tokens(self.prepared(prompt, "")))
        return len(ids) - (ids[-1:] != [] and ids[-1] in special)  # the end of the text comes later

    def embed(self, hidden: np.ndarray, mask: np.ndarray, prompt_length: int = 0) -> np.ndarray:
        """Embeddings (batch, size) of hidden states (batch, tokens, size) behind a mask (batch, tokens)."""
        kept = np.where(np.cumsum(mask != 0, axis=1) > prompt_length, mask, 0)
        tokens = Tokens(hidden, mask, kept)
        vectors = np.concatenate([_POOLED[mode](tokens) for mode in self.modes], axis=-1)
        for step in self.steps:
            vectors = step.apply(vectors)
        return np.asarray(vectors, hidden.dtype)


def read_modules(folder: Path) -> SentenceModules:
    """The modules of a folder; a mean of the tokens if it is not one of sentence-transformers.

    BadInput names the module or the option that is not supported, a broken file, or a path that leaves the folder.
    """
    if not (folder / MODULES).is_file():
        old = folder / "1_Pooling" / "config.json"
        return SentenceModules() if not old.is_file() else _pooled(_read(_Pooling, old), old)
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
        _Options, next((folder / n for n in _TRANSFORMER if (folder / n).is_file()), folder / _TRANSFORMER[0])
    )
    if options.module_output_name not in (None, "token_embeddings"):
        raise _unsupported(f"its output {options.module_output_name!r}", folder / _TRANSFORMER[0])
    if options.max_seq_length is not None and options.max_seq_length < 1:
        raise BadInput(f"max_seq_length is {options.max_seq_length}", where=folder / _TRANSFORMER[0])
    settings = _read(_Settings, folder / SETTINGS)
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.prompts:
        raise BadInput(f"default_prompt_name {settings.default_prompt_name!r} is not a prompt", where=folder / SETTINGS)
    if not pooling.is_file():
        raise BadInput("this file is not there", where=pooling, advice=f"{MODULES} names it")
    pooled = _pooled(_read(_Pooling, pooling), pooling)
    return SentenceModules(
        pooled.modes,
        pooled.include_prompt,
        tuple(_READ[kind](path) for kind, path in listed if kind in _READ),
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
    found = []
    for module in [_checked(_Listed, part, where) for part in listed]:
        library, _, kind = module.type.rpartition(".")
        supported = ("Transformer", "Pooling", "Dropout", *_READ)
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
        found.append((kind, folder / path))
    return found


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


def _pooled(config: _Pooling, where: Path) -> SentenceModules:
    modes = config.modes()
    unknown = [mode for mode in modes if mode not in _POOLED]
    if unknown or not modes:
        raise _unsupported(f"the pooling {', '.join(map(repr, unknown)) or 'of nothing'}", where, _POOLED)
    return SentenceModules(tuple(modes), config.include_prompt)


def _unsupported(what: str, where: Path, known: Sequence[str] | Mapping[str, Any] = ()) -> BadInput:
    return BadInput(f"{what} is not supported", where=where, advice=f"there are: {', '.join(known)}" if known else None)


def _dense(folder: Path) -> Dense:
    where = folder / "config.json"
    config = _read(_Dense, where)
    library, _, activation = config.activation_function.rpartition(".")
    if library.split(".")[0] != "torch" or activation not in _ACTIVATIONS:
        raise _unsupported(f"the activation {config.activation_function!r}", where, _ACTIVATIONS)
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
    size = (_read(_LayerNorm, folder / "config.json").dimension,)
    tensors = _tensors(folder)
    return LayerNorm(*(_tensor(tensors, f"norm.{name}", size, folder) for name in ("weight", "bias")))


_READ: Mapping[str, Callable[[Path], Step]] = {
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
