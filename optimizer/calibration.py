"""The user's own inputs as cases: texts through the tokenizer, or arrays by name."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.compare import Case
from planish.optimizer.errors import BadInput
from planish.optimizer.fitting import Room
from planish.optimizer.program import SIGNALS, SUM, Axis, Signature, TensorSpec

_BATCH = 4
_CASES = 8
"""At most this many cases serve as reference: one long, one single, the others padded batches."""


def read_cases(path: Path, signature: Signature, tokenizer: Any | None) -> list[Case]:
    """Cases from a `.txt` or `.jsonl` file of texts, or from an `.npz` file of arrays by input name.

    BadInput if the file is missing, empty, has the wrong keys, or holds texts and there is no tokenizer.
    """
    if not path.is_file():
        raise BadInput("there is no such file", where=path)
    if path.suffix == ".npz":
        return [read_arrays(path, signature)]
    if tokenizer is None:
        raise BadInput(
            "texts need a tokenizer, and the source brings none", where=path, advice="give an .npz file of arrays"
        )
    texts = list(read_texts(path))
    return batches_of(texts[: _BATCH * _CASES], signature, tokenizer)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: one a line, or the field `text` (or the only field) of each JSON line; never none."""
    found = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found += 1
                yield _text_of(line, path, number) if path.suffix == ".jsonl" else line.rstrip("\n")
    if not found:
        raise BadInput("this file holds no text", where=path)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise BadInput("this line is not JSON", where=f"{path}, line {number}") from None
    if isinstance(record, dict):
        record = record.get("text", next(iter(record.values())) if len(record) == 1 else None)
    if not isinstance(record, str):
        raise BadInput("this line has no field 'text'", where=f"{path}, line {number}")
    return record


def batches_of(texts: Sequence[str], signature: Signature, tokenizer: Any) -> list[Case]:
    """Tokenize texts into cases: the first alone, the others in padded batches; inputs the engine takes, its types."""
    room = Room.of(signature)
    groups = [texts[:1], *(texts[start : start + _BATCH] for start in range(1, len(texts), _BATCH))]
    fitting = [part for group in groups if group for part in room.groups(group)]
    return [tokenize(room.filled(part), signature, tokenizer, room.tokens.maximum) for part in fitting]


def tokenize(texts: Sequence[Any], signature: Signature, tokenizer: Any, longest: int | None) -> dict[str, np.ndarray]:
    """One padded batch; texts beyond ``longest`` tokens are cut."""
    encoded = tokenizer(list(texts), **Room.of(signature).padding(longest))
    wanted = {tensor.name: tensor.numpy_dtype() for tensor in signature.inputs}
    absent = sorted(set(wanted) - set(encoded) - {"token_type_ids"})
    if absent:
        raise BadInput(f"the tokenizer gives no {absent[0]!r}", advice="give an .npz file of arrays")
    made = {name: np.asarray(encoded[name], dtype) for name, dtype in wanted.items() if name in encoded}
    if "token_type_ids" in wanted and "token_type_ids" not in made:
        made["token_type_ids"] = np.zeros(made["input_ids"].shape, wanted["token_type_ids"])
    return made


def read_arrays(path: Path, signature: Signature) -> Case:
    """The inputs of a component from an `.npz` file; BadInput says which array is missing or does not fit, and how."""
    if not path.is_file():
        raise BadInput("there is no such file", where=path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"this is not an .npz file of plain arrays ({error})", where=path) from error
    for tensor in signature.inputs:
        if tensor.name not in found:
            raise BadInput(f"it has no array {tensor.name!r}; it has {sorted(found)}", where=path)
        _refuse_misfit(found[tensor.name], tensor, path)
    arrays = {tensor.name: found[tensor.name].astype(tensor.numpy_dtype()) for tensor in signature.inputs}
    _refuse_other_sizes(arrays, signature, path)
    return arrays


def _refuse_misfit(array: np.ndarray, tensor: TensorSpec, path: Path) -> None:
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


def _refuse_other_sizes(arrays: Case, signature: Signature, path: Path) -> None:
    """BadInput if two arrays disagree about an axis, or one is longer along it than the model takes."""
    sizes: dict[str, int] = {}
    for tensor in signature.inputs:
        for size, dim in zip(arrays[tensor.name].shape, tensor.shape, strict=True):
            if isinstance(dim, int) or SUM in dim:
                continue
            axis = signature.axes.get(dim, Axis(dim))
            if sizes.setdefault(dim, size) != size or axis.clamp(size) != size:
                raise BadInput(f"array {tensor.name!r} has {size} along {dim!r}, which does not fit", where=path)
