"""Quantized weights of a checkpoint, dequantized lazily, one strip at a time.

For a linear layer with a weight of shape (out, in)::

    GPTQ      qweight (in·bits/32, out), qzeros (groups, out·bits/32), scales (groups, out), g_idx (in)
              weight[o, i] = scales[g, o] · (q[i, o] - z[g, o])    g = g_idx[i]; version 1 stores z - 1
    AWQ       qweight (in, out/8), qzeros (groups, out/8), scales (groups, out)
              the same, with g = i // group size; eight columns of a word in the order 0 2 4 6 1 3 5 7
    FP8       weight (out, in) as E4M3, weight_scale or weight_scale_inv: one, one a row, or one a block
              weight[o, i] = code[o, i] · scale[block of (o, i)]    also where the name ends with `_inv`

Codes of GPTQ are a stream of bits, the lowest first, along the packed axis (Frantar et al. 2022, as AutoGPTQ packs).
AWQ is Lin et al. 2023, as AutoAWQ packs for its `gemm` kernel. Blocks of FP8 are those of DeepSeek-V3 (2024).
Activations are computed in float: settings for them are ignored. Every other method is refused by name.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.checkpoint.weights import Stored, Weight, numpy_type
from planish.optimizer.system.json_files import read_object
from planish.optimizer.system.links import file_in

_ADVICE = "give the float checkpoint that it was made of; presets quantize by themselves"
_KEYS = ("quantization_config", "compression_config")
BESIDE = "quantize_config.json"
"""File of AutoGPTQ for the settings that are in config.json today."""
_STRIP = 1 << 22
"""Elements that are unpacked at a time."""
_WORD = 32
"""Bits of the integers that hold packed codes."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in a word of each of eight neighbours."""
_BITS = (2, 3, 4, 8)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_BLOCK = (128, 128)
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale", "q_scale")
"""Scales of activations, which are computed in float here."""


@dataclass(frozen=True)
class Quantized(Weight):
    """A matrix that is dequantized when it is read."""

    name: str
    whole: tuple[int, int]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the matrix, (out, in)."""
        return self.whole

    @abstractmethod
    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows of the matrix in float32; ``begin`` is a multiple of eight."""

    def read(self) -> np.ndarray:
        """Its values in a new array."""
        array = np.empty(self.shape, numpy_type(self.dtype))
        self.read_into(array)
        return array

    def read_into(self, array: np.ndarray) -> None:
        """Write its values into an array, strip by strip."""
        turned = array.transpose(np.argsort(self.order))
        for begin, end in self._steps():
            turned[begin:end] = self.rows(begin, end)

    def strips(self) -> Iterator[np.ndarray]:
        """Its values strip by strip; all at once if it is transposed."""
        if self.order != (0, 1):
            yield self.read()
            return
        for begin, end in self._steps():
            yield self.rows(begin, end)

    def _steps(self) -> Iterator[tuple[int, int]]:
        step = max(8, _STRIP // max(1, self.whole[1]) // 8 * 8)
        yield from ((begin, min(begin + step, self.whole[0])) for begin in range(0, self.whole[0], step))


@dataclass(frozen=True)
class Packed(Quantized):
    """Codes of a few bits with a scale and a zero point for each group of inputs: GPTQ and AWQ."""

    bits: int
    qweight: Stored
    qzeros: Stored
    scales: Stored
    g_idx: Stored | None
    """The group of each input; None if groups are contiguous."""
    offset: int
    """Offset of stored zero points."""
    interleaved: bool
    """True if ``qweight`` is packed along its rows, in the order of AWQ."""

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows of the matrix, which are columns of the stored tensor."""
        inputs = self.whole[1]
        zeros = self._columns(self.qzeros, begin, end).astype(np.int32)
        zeros = (zeros + self.offset) & ((1 << self.bits) - 1)  # what is stored for a zero point of 0 wraps around
        scales = self.scales.mapped()[:, begin:end].astype(np.float32)
        if self.interleaved:
            codes = self._columns(self.qweight, begin, end)
        else:
            codes = unpack(self.qweight.mapped()[:, begin:end], self.bits, inputs)
        groups = self._groups(inputs, len(scales))
        return np.asarray(((codes.astype(np.int32) - zeros[groups]) * scales[groups]).T, np.float32)

    def _columns(self, stored: Stored, begin: int, end: int) -> np.ndarray:
        """Codes of a range of outputs from a matrix that is packed along them."""
        if self.interleaved:
            words = stored.mapped()[:, begin // 8 : -(-end // 8)].view(np.uint32)
            shifts = 4 * np.array(_AWQ_ORDER, np.uint32)
            codes = (words[:, :, None] >> shifts) & np.uint32(15)
            return np.asarray(codes.reshape(len(words), -1)[:, : end - begin])
        return unpack(stored.mapped().T, self.bits, self.whole[0])[begin:end].T

    def _groups(self, inputs: int, count: int) -> np.ndarray:
        if self.g_idx is not None:
            return np.asarray(self.g_idx.mapped())
        return np.arange(inputs) // -(-inputs // count)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` codes along the first axis of int32 ``words``, a stream of bits, as uint32."""
    words = words.view(np.uint32) if words.flags.c_contiguous else words.astype(np.int32).view(np.uint32)
    first, shift = np.divmod(np.arange(count) * bits, _WORD)
    codes = words[first] >> shift.astype(np.uint32)[:, None]
    spilled = np.flatnonzero(shift + bits > _WORD)  # with three bits, some codes lie in two words
    codes[spilled] |= words[first[spilled] + 1] << (_WORD - shift[spilled]).astype(np.uint32)[:, None]
    return np.asarray(codes & np.uint32((1 << bits) - 1))


@dataclass(frozen=True)
class Scaled(Quantized):
    """Float8 codes with one scale for all, per row, or per block: FP8."""

    codes: Stored
    scale: Stored
    block: tuple[int, int]
    """Rows and columns that share a scale."""

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows of the matrix."""
        high, wide = self.block
        shape = tuple(-(-size // part) for size, part in zip(self.whole, self.block, strict=True))
        scales = self.scale.mapped().astype(np.float32).reshape(shape)[np.arange(begin, end) // high]
        spread = scales[:, np.arange(self.whole[1]) // wide] if shape[1] > 1 else scales
        return np.asarray(self.codes.mapped()[begin:end].astype(np.float32) * spread)


def float_weights(raw: Mapping[str, Any], folder: Path, weights: Mapping[str, Stored]) -> dict[str, Weight]:
    """The weights of a checkpoint with quantized ones dequantized, by the names of float weights.

    ``raw`` is its config.json. BadInput if the method is unsupported, or its tensors are inconsistent.
    """
    settings = scheme(raw, folder)
    dequantized: dict[str, Weight] = dict(weights)
    if settings is not None:
        method, config = settings
        _METHODS[method](config, folder, dequantized)
    _refuse_left_codes(dequantized, folder)
    return dequantized


def scheme(raw: Mapping[str, Any], folder: Path) -> tuple[str, Mapping[str, Any]] | None:
    """Method and settings of a quantized checkpoint; None for float. BadInput for unsupported methods."""
    path = folder / "config.json"
    nested = [part for part in raw.values() if isinstance(part, dict)]
    configs = [part[key] for part in (raw, *nested) for key in _KEYS if part.get(key) is not None]
    if not configs and file_in(folder, BESIDE) is not None:
        path = folder / BESIDE
        configs = [{"quant_method": "gptq", **read_object(path)}]
    if not configs:
        return None
    config = configs[0]
    if not isinstance(config, dict):
        raise BadInput(f"its quantization_config is no object but {config!r}", where=path)
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else "unknown")).lower()
    if method == "compressed-tensors" and config.get("format") not in ("float-quantized", "naive-quantized"):
        method = f"compressed-tensors, {config.get('format')}"
    if method == "modelopt" and config.get("quant_algo") != "FP8":
        method = f"modelopt, {config.get('quant_algo')}"
    if method not in _METHODS:
        raise BadInput(f"its weights are quantized ({method}), which is not read", where=path, advice=_ADVICE)
    return method, config


def _read_gptq(config: Mapping[str, Any], folder: Path, weights: dict[str, Weight]) -> None:
    """Replace the tensors of GPTQ by dequantized weights."""
    kind = config.get("checkpoint_format", config.get("format", "gptq"))
    if kind not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        kind = "marlin" if config.get("is_marlin_format") else kind
        raise BadInput(f"its weights are packed for {kind}, which is not read", where=folder, advice=_ADVICE)
    bits = config.get("bits")
    if bits not in _BITS:
        raise BadInput(f"its weights are quantized to {bits} bits, which is not read", where=folder, advice=_ADVICE)
    for module in _modules(weights, "qweight"):
        parts = _take(weights, module, folder, ("qweight", "qzeros", "scales"), ("g_idx",))
        outputs = parts["qweight"].stored_shape[1]
        # single modules may have other bits than the rest (`dynamic`): the shape of the zero points tells
        # With per-module settings (dynamic), bits follow from the shapes of the stored tensors.
        stored_bits = parts["qzeros"].stored_shape[1] * _WORD // max(1, outputs) if config.get("dynamic") else bits
        inputs = parts["qweight"].stored_shape[0] * _WORD // stored_bits if stored_bits in _BITS else 0
        shapes = {
            "qweight": (inputs * stored_bits // _WORD, outputs),
            "qzeros": (parts["scales"].stored_shape[0], -(-outputs * stored_bits // _WORD)),
        }
        group = parts.get("g_idx")
        name, offset = f"{module}.weight", 0 if kind == "gptq_v2" else 1
        tensors = parts["qweight"], parts["qzeros"], parts["scales"], group
        packed = Packed(name, (outputs, inputs), stored_bits, *tensors, offset, interleaved=False)
        _check_packed(packed, shapes, folder)
        weights[name] = packed


def _read_awq(config: Mapping[str, Any], folder: Path, weights: dict[str, Weight]) -> None:
    """Replace the tensors of AWQ by dequantized weights."""
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != 4 or version not in ("gemm", "exllama", "ipex"):  # the last two store what gemm stores
        raise BadInput(
            f"its weights are packed by AWQ to {bits} bits for {version}, which is not read",
            where=folder,
            advice=_ADVICE,
        )
    for module in _modules(weights, "qweight"):
        parts = _take(weights, module, folder, ("qweight", "qzeros", "scales"))
        inputs, outputs = parts["qweight"].stored_shape[0], parts["scales"].stored_shape[1]
        groups = parts["scales"].stored_shape[0]
        shapes = {"qweight": (inputs, outputs // 8), "qzeros": (groups, outputs // 8)}
        tensors = parts["qweight"], parts["qzeros"], parts["scales"], None
        packed = Packed(f"{module}.weight", (outputs, inputs), 4, *tensors, 0, interleaved=True)
        if outputs % 8:
            raise _misshapen(packed.name, folder)
        _check_packed(packed, shapes, folder)
        weights[packed.name] = packed


def _check_packed(packed: Packed, shapes: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Raise BadInput unless the tensors of a weight have consistent shapes, and all groups exist."""
    outputs, inputs = packed.whole
    groups = packed.scales.stored_shape[0]
    fits = (
        all(getattr(packed, name).stored_shape == shape for name, shape in shapes.items())
        and packed.scales.stored_shape == (groups, outputs)
        and packed.scales.stored in _FLOATS
        and {packed.qweight.stored, packed.qzeros.stored} == {ir.DataType.INT32}
        and 0 < groups <= inputs
        and outputs > 0
    )
    if fits and packed.g_idx is not None:
        fits = packed.g_idx.stored_shape == (inputs,) and packed.g_idx.stored in (ir.DataType.INT32, ir.DataType.INT64)
        fits = fits and packed.g_idx.mapped().min() >= 0 and int(packed.g_idx.mapped().max()) < groups
    if not fits:
        raise _misshapen(packed.name, folder)


def _read_float8(config: Mapping[str, Any], folder: Path, weights: dict[str, Weight]) -> None:
    """Replace float8 codes and their scales by dequantized weights."""
    said = config.get("weight_block_size") or _BLOCK
    if not isinstance(said, list | tuple) or len(said) != 2 or any(type(n) is not int or n < 1 for n in said):
        raise BadInput(f"its weight_block_size is no pair of sizes but {said!r}", where=folder / "config.json")
    block = (said[0], said[1])
    for key in [key for key in weights if key.rpartition(".")[2] in _OF_ACTIVATIONS]:
        del weights[key]
    for suffix in _SCALES:
        for module in _modules(weights, suffix):
            parts = _take(weights, module, folder, ("weight", suffix))
            codes, scale = parts["weight"], parts[suffix]
            name, shape = f"{module}.weight", codes.stored_shape
            if codes.stored not in _FLOAT8 or scale.stored not in _FLOATS or len(shape) != 2 or 0 in shape:
                raise _misshapen(name, folder)
            blocks = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
            if math.prod(scale.stored_shape) == 1:
                shared = (shape[0], shape[1])
            elif scale.stored_shape in ((shape[0],), (shape[0], 1)) and scale.stored_shape != blocks:
                shared = (1, shape[1])
            elif scale.stored_shape == blocks:
                shared = block
            else:
                raise _misshapen(name, folder)
            weights[name] = Scaled(name, (shape[0], shape[1]), codes, scale, shared)


_METHODS: Mapping[str, Callable[[Mapping[str, Any], Path, dict[str, Weight]], None]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "fp8": _read_float8,
    "compressed-tensors": _read_float8,
    "modelopt": _read_float8,
}


def _modules(weights: Mapping[str, Weight], suffix: str) -> list[str]:
    """Modules that have a tensor of this name."""
    return [key.removesuffix(f".{suffix}") for key in weights if key.endswith(f".{suffix}")]


def _take(
    weights: dict[str, Weight], module: str, folder: Path, needed: tuple[str, ...], others: tuple[str, ...] = ()
) -> dict[str, Stored]:
    """Remove the tensors of one module from the weights and return them by name; BadInput if a required one is
    missing."""
    parts: dict[str, Stored] = {}
    for suffix in (*needed, *others):
        tensor = weights.pop(f"{module}.{suffix}", None)
        if isinstance(tensor, Stored):
            parts[suffix] = tensor
    absent = [suffix for suffix in needed if suffix not in parts]
    if absent:
        raise BadInput(f"{module!r} is quantized and has no {absent[0]}", where=folder, advice="download it again")
    flat = [suffix for suffix in needed if suffix.startswith("q") and len(parts[suffix].stored_shape) != 2]
    if flat or ("scales" in parts and len(parts["scales"].stored_shape) != 2):
        raise _misshapen(f"{module}.weight", folder)
    return parts


def _misshapen(name: str, folder: Path) -> BadInput:
    return BadInput(
        f"the quantized parts of {name!r} do not have the shapes, types and groups that config.json describes",
        where=folder,
        advice="config.json and the weights are of different models, or the method is another one",
    )


def _refuse_left_codes(weights: Mapping[str, Weight], folder: Path) -> None:
    """Raise BadInput for float8 codes without scales."""
    for name, tensor in weights.items():
        if name.endswith((".qweight", ".qzeros", ".weight_packed")):
            what = f"{name!r} is packed, and config.json does not say how"
        elif tensor.dtype in (*_FLOAT8, ir.DataType.FLOAT8E8M0):
            what = f"{name!r} has elements of 8 bits ({tensor.dtype.name}) and no scales"
        else:
            continue
        raise BadInput(what, where=folder, advice=_ADVICE)


def without_codes(config: Any) -> Any:
    """The configuration of the float model; with quantization settings, transformers would expect codes."""
    for key in _KEYS:
        if getattr(config, key, None) is not None:
            delattr(config, key)
    return config


def text_without_codes(path: Path) -> str | None:
    """The content of config.json beside an engine, without quantization settings; None if it has none."""
    raw = read_object(path)
    kept = {key: value for key, value in raw.items() if key not in _KEYS}
    return None if kept.keys() == raw.keys() else json.dumps(kept, indent=2) + "\n"
