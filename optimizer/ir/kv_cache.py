"""Key-value caches: names of their tensors, and their quantization to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.program import Arrays, Role, TensorSpec

PAST = "past"
"""The axis along which a cache grows."""
PAST_NAME, PRESENT_NAME = "past_key_values.", "present."
"""How the names of a cache's tensors begin, as a graph takes and gives them."""
CACHE_SCALE = ".scale"
"""Behind the name of a tensor of a cache in 8 bits: the scales of its tokens, (batch, heads, past, 1)."""
INT8_STEPS = np.float32(127)
"""What the largest entry of a token is rounded to in a cache in 8 bits."""
SMALLEST_SCALE = np.float32(2.0**-100)
"""Instead of zero, where all entries are zero."""


def as_continued(tensor: TensorSpec, outputs: Sequence[TensorSpec]) -> TensorSpec:
    """An input of the cache with the heads and the size that the output has which continues it."""
    name = tensor.name.replace(PAST_NAME, PRESENT_NAME, 1)
    twin = next((output for output in outputs if output.name == name and tensor.role is Role.CACHE), None)
    if twin is None or len(twin.shape) != 4 or len(tensor.shape) != 4:
        return tensor
    return replace(tensor, shape=(tensor.shape[0], twin.shape[1], tensor.shape[2], twin.shape[3]))


def is_cache_scale(name: str) -> bool:
    """Whether this is the name of the scales of a cache in 8 bits."""
    return name.startswith((PAST_NAME, PRESENT_NAME)) and name.endswith(CACHE_SCALE)


def in_float(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The same as engines are called and compared: a cache in 8 bits is real there, and has no scales."""
    scaled = {tensor.name.removesuffix(CACHE_SCALE) for tensor in tensors if is_cache_scale(tensor.name)}
    return tuple(
        replace(tensor, dtype=ir.DataType.FLOAT) if tensor.name in scaled else tensor
        for tensor in tensors
        if not is_cache_scale(tensor.name)
    )


def round_cache(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values (batch, heads, tokens, size) in 8 bits as `quantize-cache` keeps them, and the scale of each token
    of a head, (batch, heads, tokens, 1)."""
    largest = np.abs(array).max(axis=-1, keepdims=True, initial=0.0)
    scale = np.maximum(largest * (np.float32(1) / INT8_STEPS), SMALLEST_SCALE).astype(np.float32)
    return np.rint(array / scale).astype(np.int8), scale


def quantize_cache_inputs(tensors: Sequence[TensorSpec], inputs: Arrays) -> dict[str, np.ndarray]:
    """What is given of a cache in float where it is taken in 8 bits."""
    found: dict[str, np.ndarray] = {}
    for name in {t.name.removesuffix(CACHE_SCALE) for t in tensors if is_cache_scale(t.name)}:
        if name in inputs and np.issubdtype(inputs[name].dtype, np.floating):
            found[name], found[name + CACHE_SCALE] = round_cache(inputs[name])
    return found


def dequantize_cache_outputs(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with a cache in 8 bits made real."""
    scales = {name.removesuffix(CACHE_SCALE): a for name, a in outputs.items() if is_cache_scale(name)}
    return {n: a * scales[n] if n in scales else a for n, a in outputs.items() if not is_cache_scale(n)}


def empty_cache(tensor: TensorSpec, inputs: Arrays) -> np.ndarray:
    """A cache without tokens, for as many texts as there are."""
    rows = len(next(iter(inputs.values())))
    fixed = [dim if isinstance(dim, int) else 0 for dim in tensor.shape]
    return np.zeros([rows, *fixed[1:]], tensor.numpy_dtype())
