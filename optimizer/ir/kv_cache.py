"""KV caches: names of their tensors, and their quantization to int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.program import Arrays, Role, TensorSpec

PAST = "past"
"""The axis along which a cache grows."""
PAST_NAME, PRESENT_NAME = "past_key_values.", "present."
"""Name prefixes of the cache tensors: inputs and outputs of a graph."""
CACHE_SCALE = ".scale"
"""Name suffix of the scales of an int8 cache tensor, of shape (batch, heads, past, 1)."""
INT8_STEPS = np.float32(127)
"""The quantized value of the largest magnitude of a token in an int8 cache."""
SMALLEST_SCALE = np.float32(2.0**-100)
"""Lower bound of a scale, which prevents a division by zero if all entries are zero."""


def as_continued(tensor: TensorSpec, outputs: Sequence[TensorSpec]) -> TensorSpec:
    """A cache input with the number of heads and the head size of its corresponding output."""
    name = tensor.name.replace(PAST_NAME, PRESENT_NAME, 1)
    twin = next((output for output in outputs if output.name == name and tensor.role is Role.CACHE), None)
    if twin is None or len(twin.shape) != 4 or len(tensor.shape) != 4:
        return tensor
    return replace(tensor, shape=(tensor.shape[0], twin.shape[1], tensor.shape[2], twin.shape[3]))


def is_cache_scale(name: str) -> bool:
    """True if this is the name of the scales of an int8 cache."""
    return name.startswith((PAST_NAME, PRESENT_NAME)) and name.endswith(CACHE_SCALE)


def in_float(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors at the interface of an engine: an int8 cache is float there, and has no scales."""
    scaled = {tensor.name.removesuffix(CACHE_SCALE) for tensor in tensors if is_cache_scale(tensor.name)}
    return tuple(
        replace(tensor, dtype=ir.DataType.FLOAT) if tensor.name in scaled else tensor
        for tensor in tensors
        if not is_cache_scale(tensor.name)
    )


def round_cache(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize keys or values (batch, heads, tokens, size) to int8 as `quantize-cache` does, with a scale per token and
    head, (batch, heads, tokens, 1)."""
    # initial=0 is the maximum of an axis without entries.
    largest = np.abs(array).max(axis=-1, keepdims=True, initial=0.0)
    scale = np.maximum(largest * (np.float32(1) / INT8_STEPS), SMALLEST_SCALE).astype(np.float32)
    # Ties round to even, as QuantizeLinear does: caches of engine and reference stay equal.
    return np.rint(array / scale).astype(np.int8), scale


def quantize_cache_inputs(tensors: Sequence[TensorSpec], inputs: Arrays) -> dict[str, np.ndarray]:
    """Quantize float cache inputs for an engine whose cache is int8."""
    quantized: dict[str, np.ndarray] = {}
    for name in {t.name.removesuffix(CACHE_SCALE) for t in tensors if is_cache_scale(t.name)}:
        if name in inputs and np.issubdtype(inputs[name].dtype, np.floating):
            quantized[name], quantized[name + CACHE_SCALE] = round_cache(inputs[name])
    return quantized


def dequantize_cache_outputs(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dequantize the int8 cache outputs of an engine."""
    scales = {name.removesuffix(CACHE_SCALE): a for name, a in outputs.items() if is_cache_scale(name)}
    return {n: a * scales[n] if n in scales else a for n, a in outputs.items() if not is_cache_scale(n)}


def empty_cache(tensor: TensorSpec, inputs: Arrays) -> np.ndarray:
    """A cache without tokens, with the batch size of ``inputs``."""
    rows = len(next(iter(inputs.values())))
    fixed = [dim if isinstance(dim, int) else 0 for dim in tensor.shape]
    return np.zeros([rows, *fixed[1:]], tensor.numpy_dtype())
