"""Arrays by name from `.npz` files, fitted to the inputs of a signature."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.kv_cache import empty_cache
from planish.optimizer.ir.program import SIGNALS, SUM, Axis, Role, Signature, TensorSpec
from planish.optimizer.runtime.cases import Case, positions_of


def read_arrays(path: Path, signature: Signature) -> Case:
    """The inputs of a component from an `.npz` file; BadInput says which array is missing or does not fit, and how."""
    if not path.is_file():
        raise BadInput("there is no such file", where=path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"this is not an .npz file of plain arrays ({error})", where=path) from error
    return fitted(found, signature, path)


def fitted(found: Mapping[str, Any], signature: Signature, where: Path | str) -> Case:
    """Arrays by name as a component takes them; BadInput says which is missing or does not fit, and how.

    What stands beside token ids may be left out: then all tokens count, and nothing comes before them.
    """
    found = {**found, **implied_arrays(found, signature)}
    for tensor in signature.inputs:
        if tensor.name not in found:
            raise BadInput(f"it has no array {tensor.name!r}; it has {sorted(found)}", where=where)
        _refuse_misfit(np.asarray(found[tensor.name]), tensor, where)
    arrays = {tensor.name: np.asarray(found[tensor.name], tensor.numpy_dtype()) for tensor in signature.inputs}
    _refuse_other_sizes(arrays, signature, where)
    return arrays


def implied_arrays(found: Mapping[str, Any], signature: Signature) -> dict[str, np.ndarray]:
    """Missing inputs that follow from token ids, shape (texts, tokens): a mask of ones, segments of zeros, an empty
    cache, and positions that count the tokens of the mask."""
    ids = next((np.asarray(found[t.name]) for t in signature.inputs if t.role is Role.TOKENS and t.name in found), None)
    if ids is None or ids.ndim != 2 or any(t.role is Role.CACHE and t.name in found for t in signature.inputs):
        return {}
    mask, ones = signature.mask(), np.ones_like(ids)
    shown = ones if mask is None else np.asarray(found.get(mask.name, ones))
    counted = positions_of(shown if shown.shape == ids.shape else ones)  # a mask that does not fit is refused later
    values = {Role.MASK: ones, Role.SEGMENTS: np.zeros_like(ids), Role.POSITIONS: counted}
    absent = [tensor for tensor in signature.inputs if tensor.name not in found]
    plain = {t.name: values[t.role] for t in absent if t.role in values and len(t.shape) == ids.ndim}
    return plain | {t.name: empty_cache(t, {"input_ids": ids}) for t in absent if t.role is Role.CACHE}


def _refuse_misfit(array: np.ndarray, tensor: TensorSpec, path: Path | str) -> None:
    """BadInput if one array is not what one input takes."""
    wanted = tensor.numpy_dtype()
    if tensor.role in SIGNALS and array.dtype.kind != "f":  # raw pixels or samples, which nobody has processed
        raise BadInput(
            f"array {tensor.name!r} is {array.dtype}, not {wanted}",
            where=path,
            advice="give what the checkpoint's own processor makes: scaled and normalized",
        )
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise BadInput(f"array {tensor.name!r} is {array.dtype}, not {wanted}", where=path)
    if not np.isfinite(array).all():
        raise BadInput(f"array {tensor.name!r} holds NaN or infinity", where=path)
    fixed = zip(array.shape, tensor.shape, strict=False)
    if array.ndim != len(tensor.shape) or any(isinstance(dim, int) and dim != size for size, dim in fixed):
        taken = ", ".join(map(str, tensor.shape))
        raise BadInput(f"array {tensor.name!r} has shape {list(array.shape)}, the model takes [{taken}]", where=path)


def _refuse_other_sizes(arrays: Case, signature: Signature, path: Path | str) -> None:
    """BadInput if two arrays disagree about an axis, or one is longer along it than the model takes."""
    sizes: dict[str, int] = {}
    for tensor in signature.inputs:
        for size, dim in zip(arrays[tensor.name].shape, tensor.shape, strict=True):
            if isinstance(dim, int) or SUM in dim:
                continue
            axis = signature.axes.get(dim, Axis(dim))
            if sizes.setdefault(dim, size) != size or axis.clamp(size) != size:
                raise BadInput(f"array {tensor.name!r} has {size} along {dim!r}, which does not fit", where=path)
    for tensor in signature.inputs:
        for size, dim in zip(arrays[tensor.name].shape, tensor.shape, strict=True):
            parts = dim.split(SUM) if isinstance(dim, str) and SUM in dim else []
            if parts and sizes.keys() >= set(parts) and size != sum(sizes[part] for part in parts):
                raise BadInput(f"array {tensor.name!r} has {size} along {dim!r}, which does not fit", where=path)
