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
from planish.optimizer.program import Signature

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
        return [_arrays(path, signature)]
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
    longest = signature.axes["sequence"].maximum if "sequence" in signature.axes else None
    groups = [texts[:1], *(texts[start : start + _BATCH] for start in range(1, len(texts), _BATCH))]
    return [tokenize(group, signature, tokenizer, longest) for group in groups if group]


def tokenize(texts: Sequence[Any], signature: Signature, tokenizer: Any, longest: int | None) -> dict[str, np.ndarray]:
    """One padded batch; texts beyond ``longest`` tokens are cut."""
    encoded = tokenizer(
        list(texts), padding=True, truncation=longest is not None, max_length=longest, return_tensors="np"
    )
    wanted = {tensor.name: tensor.numpy_dtype() for tensor in signature.inputs}
    absent = sorted(set(wanted) - set(encoded) - {"token_type_ids"})
    if absent:
        raise BadInput(f"the tokenizer gives no {absent[0]!r}", advice="give an .npz file of arrays")
    made = {name: np.asarray(encoded[name], dtype) for name, dtype in wanted.items() if name in encoded}
    if "token_type_ids" in wanted and "token_type_ids" not in made:
        made["token_type_ids"] = np.zeros(made["input_ids"].shape, wanted["token_type_ids"])
    return made


def _arrays(path: Path, signature: Signature) -> Case:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"this is not an .npz file of plain arrays ({error})", where=path) from error
    for tensor in signature.inputs:
        if tensor.name not in found:
            raise BadInput(f"it has no array {tensor.name!r}; it has {sorted(found)}", where=path)
        if not np.can_cast(found[tensor.name].dtype, tensor.numpy_dtype(), "same_kind"):
            raise BadInput(
                f"array {tensor.name!r} is {found[tensor.name].dtype}, not {tensor.numpy_dtype()}", where=path
            )
        if not np.isfinite(found[tensor.name]).all():
            raise BadInput(f"array {tensor.name!r} holds NaN or infinity", where=path)
    return {tensor.name: found[tensor.name].astype(tensor.numpy_dtype()) for tensor in signature.inputs}
