"""Inputs generated from a signature: several lengths, a padded batch, the longest length, prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from planish.optimizer.errors import OutOfResources, UsageError
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import SIGNALS, SUM, Axis, Role, Signature, TensorSpec, leading_axis
from planish.optimizer.runtime.cases import Case, positions_of, size_of_case
from planish.optimizer.runtime.teacher_forcing import CONTINUED, Prompt
from planish.optimizer.system.machine import demand_memory

_LONGEST = 1024
"""Maximum length of reference inputs, whatever the model supports."""
_PLANS = [(3, 20), (1, 2), (1, 64), (1, _LONGEST)]
"""Batch size and tokens of each case."""
_CACHED_PLANS = [(1, 9, 4), (3, 9, 0), (2, 1, 7), (1, 1, 1), (3, 4, 12), (1, 1, 500), (1, _LONGEST, 0)]
"""Batch size, new tokens, and past tokens of each case of a model with a cache. The first has no padding: in double
precision some models give NaN for leading padding, and the noise floor is estimated on it."""
_PROMPTS = [(3, 9), (1, 1), (1, 96)]
"""Batch size and tokens of the prompts: a padded batch, the shortest, a long one."""
QUICK = 2
"""Number of cases on which single passes are checked."""
_SHARE = 0.75
"""Length ratio of each row of a padded batch to the row before."""
_GRAIN = 8
"""Block size of generated images and spectrograms: neighbouring values are correlated, as in real ones."""
_SILENCE = -1.0
"""The lowest value of a generated spectrogram."""
DEFAULT_SHAPE: Mapping[str, int] = {"batch": 1, "choices": 4, "sequence": 128, "encoder_sequence": 128}
"""Default sizes at which engines are timed; other axes have size 1."""
_MOST_ELEMENTS = 1 << 27
"""Maximum entries of a generated input; the cache of a model with 70 billion parameters has a million per tensor."""


def make_inputs(signature: Signature, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Cases from the signature: short, medium, a padded batch, the longest; equal for equal seeds."""
    generator = np.random.default_rng(seed)
    return [make_case(signature, sizes, generator, counted) for sizes, counted in case_sizes(signature)]


def default_shapes(signature: Signature) -> tuple[Mapping[str, int], ...]:
    """Default shapes for timing: one text; with a cache, its prefill and one decoding step.

    A component with an encoder's keys has decoding steps only, since another component computes the prefill.
    """
    if PAST not in signature.axes:
        return (DEFAULT_SHAPE,)
    step = {**DEFAULT_SHAPE, "sequence": 1, PAST: 128}
    # A cache without the past axis holds the encoder's keys.
    begun = any(tensor.role is Role.CACHE and PAST not in tensor.shape for tensor in signature.inputs)
    return (step,) if begun else ({**DEFAULT_SHAPE, PAST: 0}, step)


def sized_case(signature: Signature, sizes: Mapping[str, int]) -> tuple[Case, str]:
    """A case of the requested sizes within the limits of the axes, and its sizes as text."""
    all_sizes = known_sizes(signature, sizes)
    text = ",".join(f"{name}={size}" for name, size in all_sizes.items()) or "fixed"
    return make_case(signature, all_sizes, np.random.default_rng(0)), text


def refuse_other_sizes(signatures: Iterable[Signature], shapes: Iterable[Mapping[str, int]]) -> None:
    """Raise UsageError for sizes that no component supports: unknown axes, or sizes outside their limits.

    The batch axis may be called `batch`, and a token axis `sequence`, as in `known_sizes`.
    """
    all_signatures = list(signatures)
    for sizes in shapes:
        where = "--shape " + ",".join(f"{name}={size}" for name, size in sizes.items())
        for name, size in sizes.items():
            axes = [a for s in all_signatures for a in s.axes.values() if name in (a.name, _usual_name(s, a.name))]
            if not axes:
                names = dict.fromkeys(axis for signature in all_signatures for axis in signature.axes)
                advice = f"there are: {', '.join(names) or 'none'}"
                raise UsageError(f"no input has an axis {name!r}", where=where, advice=advice)
            for axis in axes:
                if axis.clamp(size) != size and (axis.name == name or axis.name not in sizes):
                    raise UsageError(f"the model takes {axis.span} along {axis.name!r}", where=where)
        for signature in all_signatures:
            past = known_sizes(signature, sizes).get(PAST, 0)
            if past < sizes.get(PAST, 0) and PAST in signature.axes:
                raise UsageError(f"behind so many tokens the model takes a past of {past} at most", where=where)


def known_sizes(signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis: the requested one, within the limits of the axis.

    An axis that is not named gets the size of `batch` if it is the first axis of the first input, of `sequence` if it
    is a token axis, else 1.
    """
    all_sizes = {
        name: axis.clamp(sizes.get(name, sizes.get(_usual_name(signature, name), axis.minimum)))
        for name, axis in signature.axes.items()
    }
    if PAST in all_sizes and "sequence" in all_sizes:
        # Past and new tokens together are at most limit + 1, the number of positions of the model.
        limit = signature.axes[PAST].maximum
        if limit is not None:
            all_sizes[PAST] = min(all_sizes[PAST], max(0, limit + 1 - all_sizes["sequence"]))
    return all_sizes


def _usual_name(signature: Signature, axis: str) -> str:
    if axis == leading_axis(signature):
        return "batch"
    along = [tensor for tensor in signature.inputs if tensor.dtype.is_integer() and axis in tensor.shape[1:]]
    return "sequence" if along else axis


def make_prompts(signature: Signature, seed: int = 0) -> list[Prompt]:
    """Prompts for the component that takes them: texts, or recordings of the encoder's fixed length."""
    generator = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    previous: list[Mapping[str, int]] = []
    for count, length in _PROMPTS:
        sizes = {name: axis.clamp(_prompted(axis, count, length)) for name, axis in signature.axes.items()}
        # Short models clamp several plans to the same sizes.
        if sizes in previous:
            continue
        previous.append(sizes)
        case = make_case(signature, sizes, generator)
        prompt = {t.name: case[t.name] for t in signature.inputs if t.role in _ASKED}
        prompts.append((prompt, CONTINUED // 2 if count > 1 else 0))
    return prompts


_ASKED = SIGNALS | {Role.TOKENS, Role.MASK}
"""Roles of the inputs of a prompt; positions and an empty cache follow from them."""


def _prompted(axis: Axis, count: int, length: int) -> int:
    """The size of an axis in a prompt, with space left for the answer."""
    if axis.name in ("batch", PAST):
        return count if axis.name == "batch" else 0
    return length if axis.maximum is None else max(1, min(length, axis.maximum - CONTINUED))


def takes_prompts(signature: Signature) -> bool:
    """True if a component takes prompts: tokens and a mask over all of them, and otherwise only a cache."""
    names = {tensor.name for tensor in signature.inputs}
    return {"input_ids", "attention_mask"} <= names and (PAST not in signature.axes or _masks_past(signature))


def _masks_past(signature: Signature) -> bool:
    return PAST in str(signature.input("attention_mask").shape[-1]).split(SUM)


def case_sizes(signature: Signature) -> list[tuple[dict[str, int], int | None]]:
    """Sizes of the axes in each case, and the number of tokens of its longest text (None: all).

    A small padded batch is first, the longest case last. With a cache: a prefill, a step after a short past, several
    tokens after a long one. With a static length, shorter texts are padded to it.
    """
    axes = list(signature.axes.values())
    if not axes:
        return [({}, tokens) for _, tokens in _PLANS] if signature.mask() is not None else [({}, None)]
    leading = leading_axis(signature)
    running = any(axis.name not in (leading, PAST) for axis in axes)
    plans = _CACHED_PLANS if PAST in signature.axes else [(count, length, 0) for count, length in _PLANS]
    return [
        (
            {axis.name: axis.clamp(_planned(axis, leading, *plan)) for axis in _roomy(axes, plan[1])},
            None if PAST in signature.axes else plan[1],
        )
        for plan in plans
        # Without a token axis longer plans would repeat the same case.
        if running or plan[1] < 64
    ]


def _planned(axis: Axis, leading: str | None, count: int, length: int, past: int) -> int:
    """The size that a plan gives to an axis. The encoder's sequence is as long as past and tokens."""
    if axis.name in (leading, PAST):
        return count if axis.name == leading else past
    return length if axis.name == "sequence" or not past else length + past + 2


def _roomy(axes: Sequence[Axis], length: int) -> list[Axis]:
    """The axes, with the past limited so that ``length`` more tokens fit."""
    return [
        replace(axis, maximum=max(axis.minimum, axis.maximum + 1 - length))
        if axis.name == PAST and axis.maximum is not None
        else axis
        for axis in axes
    ]


def make_case(
    signature: Signature, sizes: Mapping[str, int], generator: np.random.Generator, counted: int | None = None
) -> dict[str, np.ndarray]:
    """One case of the given sizes: values by role, with padding by the mask and after ``counted`` tokens."""
    _demand_room(signature, sizes)
    arrays = {tensor.name: _values(tensor, signature.shape_of(tensor, sizes), generator) for tensor in signature.inputs}
    mask = signature.mask()
    if mask is not None:
        if counted is not None:
            arrays[mask.name] = _mask(arrays[mask.name].shape, counted).astype(mask.numpy_dtype())
        if PAST in str(mask.shape[-1]).split(SUM):  # prompts of one batch end together: they are padded on the left
            arrays[mask.name] = np.ascontiguousarray(arrays[mask.name][..., ::-1])
        visible = arrays[mask.name] != 0
        for tensor in signature.inputs:
            _apply_mask(tensor, arrays[tensor.name], visible)
    return arrays


def _demand_room(signature: Signature, sizes: Mapping[str, int]) -> None:
    """Raise OutOfResources if the arrays of a case exceed the maximum size, or memory."""
    shapes = {tensor: signature.shape_of(tensor, sizes) for tensor in signature.inputs}
    for tensor, shape in shapes.items():
        if math.prod(shape) > _MOST_ELEMENTS:
            raise OutOfResources(
                f"inputs of the shape {list(shape)} are not made",
                where=f"input {tensor.name!r}",
                advice=f"they have at most {_MOST_ELEMENTS} entries; fix its axes to smaller sizes",
            )
    needed = sum(math.prod(shape) * tensor.numpy_dtype().itemsize for tensor, shape in shapes.items())
    # numpy's generators draw float64 arrays, converted afterwards.
    largest = max(map(math.prod, shapes.values()), default=0) * np.dtype(np.float64).itemsize
    demand_memory(needed + largest, "a reference input", "fix its axes to smaller sizes")


def _apply_mask(tensor: TensorSpec, values: np.ndarray, visible: np.ndarray) -> None:
    """Set padding values, and positions without padding, in tensors with the axes of (the end of) the mask."""
    if values.ndim != visible.ndim or values.shape[-1] > visible.shape[-1]:
        return
    if tensor.role in (Role.TOKENS, Role.SEGMENTS) and values.shape == visible.shape:
        values[~visible] = tensor.pad
    if tensor.role is Role.POSITIONS and values.shape[:-1] == visible.shape[:-1]:  # else they are of the whole batch
        values[...] = positions_of(visible)[..., -values.shape[-1] :]


def _values(tensor: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    dtype = tensor.numpy_dtype()
    if tensor.role is Role.MASK:
        return _mask(shape).astype(dtype)
    if tensor.role is Role.POSITIONS:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if tensor.role is Role.SEGMENTS:
        return np.broadcast_to(np.arange(shape[-1]) * 2 >= shape[-1], shape).astype(dtype)
    if tensor.role is Role.BOXES:
        corners = generator.integers(0, max(tensor.bound or 1, 1), (*shape[:-1], 2, 2))
        return np.sort(corners, axis=-2).reshape(shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return _tokens(tensor, shape, generator).astype(dtype)
    if dtype == np.bool_:
        return generator.random(shape) < 0.5
    if tensor.role in SIGNALS:
        return _signal(tensor, shape, generator).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _signal(tensor: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Noisy blocks of constant level between -1 and 1; recordings of a batch get shorter, and end in silence."""
    *leading, rows, columns = shape
    levels = generator.standard_normal((*leading, -(-rows // _GRAIN), -(-columns // _GRAIN)))
    patches = levels.repeat(_GRAIN, axis=-2).repeat(_GRAIN, axis=-1)[..., :rows, :columns]
    signal = np.tanh(patches + 0.25 * generator.standard_normal(shape))
    if tensor.role is not Role.FEATURES:
        return np.asarray(signal)
    heard = _mask((*shape[:-2], columns))
    return np.where(heard[..., None, :], signal, _SILENCE)


def _tokens(tensor: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Ids below the bound, without the padding id if there are others."""
    bound = tensor.bound or 2
    ids = generator.integers(0, bound, shape)
    # A padding id among tokens would change the positions that some models derive from ids.
    return np.asarray(np.where(ids == tensor.pad, (ids + 1) % bound, ids))


def _mask(shape: tuple[int, ...], counted: int | None = None) -> np.ndarray:
    """Ones, at most ``counted`` of them; each row is padded on the right to a share of the row before."""
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    longest = shape[-1] if counted is None else min(counted, shape[-1])
    lengths = np.maximum(1, np.ceil(longest * _SHARE ** np.arange(rows))).astype(np.int64)
    return np.asarray(np.arange(shape[-1]) < lengths[:, None]).reshape(shape)


def quick(inputs: Sequence[Case]) -> list[Case]:
    """The few small cases on which single passes are checked, with padding if the model supports it."""
    small = sorted(inputs, key=size_of_case)
    return small[:QUICK]
