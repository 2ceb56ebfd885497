"""Inputs made from a signature: several lengths, a padded batch, the longest length, prompts."""

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
"""Reference inputs are not made longer than this, whatever the model allows."""
_PLANS = [(3, 20), (1, 2), (1, 64), (1, _LONGEST)]
"""Examples and tokens of each case."""
_CACHED_PLANS = [(1, 9, 4), (3, 9, 0), (2, 1, 7), (1, 1, 1), (3, 4, 12), (1, 1, 500), (1, _LONGEST, 0)]
"""Examples, new tokens, and tokens before them of each case where there is a cache. The first has no padding: in double
precision some models give NaN where padding comes first, and the noise floor is estimated on it."""
_PROMPTS = [(3, 9), (1, 1), (1, 96)]
"""Texts and tokens of the prompts: a padded batch, the shortest, a long one."""
QUICK = 2
"""How many cases passes are checked with one by one."""
_SHARE = 0.75
"""The second row of the padded batch is this share of the first, the third this share of the second, …"""
_GRAIN = 8
"""Neighbouring values of what is seen or heard are alike: made ones share a level over this many rows and columns."""
_SILENCE = -1.0
"""The lowest value of a made spectrum."""
DEFAULT_SHAPE: Mapping[str, int] = {"batch": 1, "choices": 4, "sequence": 128, "encoder_sequence": 128}
"""Sizes at which engines are timed when none are asked for; axes of other names count 1."""
_MOST_ELEMENTS = 1 << 27
"""Entries of an input that is made; a cache of a model with 70 billion parameters has a million in each tensor."""


def make_inputs(signature: Signature, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Cases from the signature alone: short, medium, a padded batch, the longest; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return [make_case(signature, sizes, generator, counted) for sizes, counted in case_sizes(signature)]


def default_shapes(signature: Signature) -> tuple[Mapping[str, int], ...]:
    """What is timed when nothing is asked for: one text; behind a cache, its prefill and one further token.

    What takes keys of an encoder writes further tokens only: another component has begun the text.
    """
    if PAST not in signature.axes:
        return (DEFAULT_SHAPE,)
    step = {**DEFAULT_SHAPE, "sequence": 1, PAST: 128}
    begun = any(tensor.role is Role.CACHE and PAST not in tensor.shape for tensor in signature.inputs)
    return (step,) if begun else ({**DEFAULT_SHAPE, PAST: 0}, step)


def sized_case(signature: Signature, sizes: Mapping[str, int]) -> tuple[Case, str]:
    """A case of the sizes asked for, as far as the axes allow them, and the text of the sizes that it has."""
    known = known_sizes(signature, sizes)
    text = ",".join(f"{name}={size}" for name, size in known.items()) or "fixed"
    return make_case(signature, known, np.random.default_rng(0)), text


def refuse_other_sizes(signatures: Iterable[Signature], shapes: Iterable[Mapping[str, int]]) -> None:
    """UsageError if an engine cannot be asked for sizes: no component has such an axis, or one takes other sizes.

    An axis that leads or runs along tokens may be called `batch` or `sequence`, as `known_sizes` does.
    """
    known = list(signatures)
    for sizes in shapes:
        where = "--shape " + ",".join(f"{name}={size}" for name, size in sizes.items())
        for name, size in sizes.items():
            axes = [a for s in known for a in s.axes.values() if name in (a.name, _usual_name(s, a.name))]
            if not axes:
                names = dict.fromkeys(axis for signature in known for axis in signature.axes)
                advice = f"there are: {', '.join(names) or 'none'}"
                raise UsageError(f"no input has an axis {name!r}", where=where, advice=advice)
            for axis in axes:
                if axis.clamp(size) != size and (axis.name == name or axis.name not in sizes):
                    raise UsageError(f"the model takes {axis.span} along {axis.name!r}", where=where)
        for signature in known:
            past = known_sizes(signature, sizes).get(PAST, 0)
            if past < sizes.get(PAST, 0) and PAST in signature.axes:
                raise UsageError(f"behind so many tokens the model takes a past of {past} at most", where=where)


def known_sizes(signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
    """A size for every axis: as asked for, as far as it allows that.

    An axis that is not named takes the size of what it is by its place: `batch` if it leads the first input,
    `sequence` if tokens run along it, else 1.
    """
    known = {
        name: axis.clamp(sizes.get(name, sizes.get(_usual_name(signature, name), axis.minimum)))
        for name, axis in signature.axes.items()
    }
    if PAST in known and "sequence" in known:
        limit = signature.axes[PAST].maximum
        known[PAST] = known[PAST] if limit is None else min(known[PAST], max(0, limit + 1 - known["sequence"]))
    return known


def _usual_name(signature: Signature, axis: str) -> str:
    if axis == leading_axis(signature):
        return "batch"
    along = [tensor for tensor in signature.inputs if tensor.dtype.is_integer() and axis in tensor.shape[1:]]
    return "sequence" if along else axis


def make_prompts(signature: Signature, seed: int = 0) -> list[Prompt]:
    """Prompts for the component that takes them: texts, or recordings of the one length that it hears."""
    generator = np.random.default_rng(seed)
    made: list[Prompt] = []
    known: list[Mapping[str, int]] = []
    for count, length in _PROMPTS:
        sizes = {name: axis.clamp(_prompted(axis, count, length)) for name, axis in signature.axes.items()}
        if sizes in known:
            continue
        known.append(sizes)
        case = make_case(signature, sizes, generator)
        prompt = {t.name: case[t.name] for t in signature.inputs if t.role in _ASKED}
        made.append((prompt, CONTINUED // 2 if count > 1 else 0))
    return made


_ASKED = SIGNALS | {Role.TOKENS, Role.MASK}
"""What a prompt is made of: positions and an empty cache follow from it."""


def _prompted(axis: Axis, count: int, length: int) -> int:
    """The size of an axis in a prompt: as many tokens as leave room for the answer."""
    if axis.name in ("batch", PAST):
        return count if axis.name == "batch" else 0
    return length if axis.maximum is None else max(1, min(length, axis.maximum - CONTINUED))


def takes_prompts(signature: Signature) -> bool:
    """Whether a component reads prompts: it takes tokens and a mask over all of them, and nothing but a cache."""
    names = {tensor.name for tensor in signature.inputs}
    return {"input_ids", "attention_mask"} <= names and (PAST not in signature.axes or _masks_past(signature))


def _masks_past(signature: Signature) -> bool:
    return PAST in str(signature.input("attention_mask").shape[-1]).split(SUM)


def case_sizes(signature: Signature) -> list[tuple[dict[str, int], int | None]]:
    """Sizes of the axes in each case, and how many tokens count of its longest text; all of them if that is None.

    A small batch with padding comes first, the longest last. Where there is a cache: a prefill, a step behind a short
    past, several tokens behind a long one. Where the length is fixed, shorter texts are padded to it.
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
        if running or plan[1] < 64
    ]


def _planned(axis: Axis, leading: str | None, count: int, length: int, past: int) -> int:
    """The size that a plan gives an axis; a sequence of its own (the encoder's) is as long as past and tokens."""
    if axis.name in (leading, PAST):
        return count if axis.name == leading else past
    return length if axis.name == "sequence" or not past else length + past + 2


def _roomy(axes: Sequence[Axis], length: int) -> list[Axis]:
    """The axes, the past so short that ``length`` further tokens fit behind it."""
    return [
        replace(axis, maximum=max(axis.minimum, axis.maximum + 1 - length))
        if axis.name == PAST and axis.maximum is not None
        else axis
        for axis in axes
    ]


def make_case(
    signature: Signature, sizes: Mapping[str, int], generator: np.random.Generator, counted: int | None = None
) -> dict[str, np.ndarray]:
    """One case of the given sizes: values by role, padding where the mask says so, and behind ``counted`` tokens."""
    _demand_room(signature, sizes)
    made = {tensor.name: _values(tensor, signature.shape_of(tensor, sizes), generator) for tensor in signature.inputs}
    mask = signature.mask()
    if mask is not None:
        if counted is not None:
            made[mask.name] = _mask(made[mask.name].shape, counted).astype(mask.numpy_dtype())
        if PAST in str(mask.shape[-1]).split(SUM):  # prompts of one batch end together: they are padded on the left
            made[mask.name] = np.ascontiguousarray(made[mask.name][..., ::-1])
        visible = made[mask.name] != 0
        for tensor in signature.inputs:
            _respect(tensor, made[tensor.name], visible)
    return made


def _demand_room(signature: Signature, sizes: Mapping[str, int]) -> None:
    """OutOfResources if the arrays of a case would be larger than anybody asks a model with, or than memory is."""
    shapes = {tensor: signature.shape_of(tensor, sizes) for tensor in signature.inputs}
    for tensor, shape in shapes.items():
        if math.prod(shape) > _MOST_ELEMENTS:
            raise OutOfResources(
                f"inputs of the shape {list(shape)} are not made",
                where=f"input {tensor.name!r}",
                advice=f"they have at most {_MOST_ELEMENTS} entries; fix its axes to smaller sizes",
            )
    needed = sum(math.prod(shape) * tensor.numpy_dtype().itemsize for tensor, shape in shapes.items())
    largest = max(map(math.prod, shapes.values()), default=0) * np.dtype(np.float64).itemsize
    demand_memory(needed + largest, "a reference input", "fix its axes to smaller sizes")


def _respect(tensor: TensorSpec, values: np.ndarray, visible: np.ndarray) -> None:
    """Write padding, and positions that do not count it, where a tensor runs along (the end of) the mask."""
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
    """Patches of one level and a little noise, between -1 and 1; recordings of a batch get shorter, then silent."""
    *leading, rows, columns = shape
    levels = generator.standard_normal((*leading, -(-rows // _GRAIN), -(-columns // _GRAIN)))
    patches = levels.repeat(_GRAIN, axis=-2).repeat(_GRAIN, axis=-1)[..., :rows, :columns]
    signal = np.tanh(patches + 0.25 * generator.standard_normal(shape))
    if tensor.role is not Role.FEATURES:
        return np.asarray(signal)
    heard = _mask((*shape[:-2], columns))
    return np.where(heard[..., None, :], signal, _SILENCE)


def _tokens(tensor: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Ids below the bound, the padding id left out where there are others."""
    bound = tensor.bound or 2
    ids = generator.integers(0, bound, shape)
    return np.asarray(np.where(ids == tensor.pad, (ids + 1) % bound, ids))


def _mask(shape: tuple[int, ...], counted: int | None = None) -> np.ndarray:
    """Ones, ``counted`` of them at most; in a batch, each row is padded on the right to a share of the row before."""
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    longest = shape[-1] if counted is None else min(counted, shape[-1])
    lengths = np.maximum(1, np.ceil(longest * _SHARE ** np.arange(rows))).astype(np.int64)
    return np.asarray(np.arange(shape[-1]) < lengths[:, None]).reshape(shape)


def quick(inputs: Sequence[Case]) -> list[Case]:
    """The few small cases that passes are checked with one by one, padding among them where there is any."""
    small = sorted(inputs, key=size_of_case)
    return small[:QUICK]
