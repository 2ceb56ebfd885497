"""Cases: the arrays of one call by name, and how they are stored."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.system.json_files import parse_json

Case = Mapping[str, np.ndarray]


_STORED = {"BOOL": "?"} | {f"{kind}{bits}": f"{kind.lower()}{bits // 8}"
                          for kind in "FIU" for bits in (8, 16, 32, 64) if (kind, bits) != ("F", 8)}  # fmt: skip
"""Element types of safetensors that cases have, as numpy names them."""
_ELEMENTS = 1 << 24
"""Outputs with more elements than this are kept in part."""
BEST, NEXT = "/best", "/next"
"""Endings of names: the best entry of each row of an output that is kept in part, and the log likelihood of the token
behind each row but the last."""


def save_cases(cases: Sequence[Case], path: Path) -> None:
    """Write cases as one safetensors file; tensors are called `<case>/<name>`. OSError if they cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    flat = {f"{index}/{name}": np.asarray(a, order="C") for index, case in enumerate(cases) for name, a in case.items()}
    try:
        save_file(flat, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_cases(path: Path) -> list[dict[str, np.ndarray]]:
    """Read cases back, arrays as parts of the mapped file; BadInput if the file is missing or broken.

    Writing to an array changes it in memory, not in the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks that the header describes the file
            raw = np.memmap(path, np.uint8, mode="c")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"these cases cannot be read ({error})", where=path) from error
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = parse_json(raw[8:start].tobytes(), path)
    header.pop("__metadata__", None)
    cases: dict[int, dict[str, np.ndarray]] = {}
    for key, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        index, _, name = key.partition("/")
        if not re.fullmatch("[0-9]{1,6}", index) or not name or entry["dtype"] not in _STORED:
            raise BadInput(
                f"{key!r} of type {entry['dtype']} is no array of a case", where=path, advice="build it again"
            )
        values = np.asarray(raw[begin:end]).view(_STORED[entry["dtype"]]).reshape(entry["shape"])
        cases.setdefault(int(index), {})[name] = values
    return [cases[index] for index in sorted(cases)]


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Position of each token of a padded batch: padding is not counted, and has position 0 itself."""
    return np.asarray(np.maximum(np.cumsum(mask != 0, axis=-1) - 1, 0))


def size_of_case(case: Case) -> int:
    """Elements of all arrays of a case."""
    return sum(array.size for array in case.values())


def thin(inputs: Case, outputs: Case) -> dict[str, np.ndarray]:
    """Outputs, of which huge ones (scores over a large vocabulary) keep evenly spaced entries of the last axis.

    The same output of reference and engine is thinned alike, so the two stay comparable. What is left out is not kept
    in memory; what metrics need of whole rows is, under names with `BEST` and `NEXT`.
    """
    kept: dict[str, np.ndarray] = {}
    for name, array in outputs.items():
        if array.ndim and array.size > _ELEMENTS:
            kept |= _of_whole_rows(inputs.get("input_ids"), name, array)
            kept[name] = array[..., :: -(-array.size // _ELEMENTS)].copy()
        else:
            kept[name] = array
    return kept


def _of_whole_rows(ids: np.ndarray | None, name: str, scores: np.ndarray) -> Case:
    """The best entry of each row, and the log likelihood of each token by the row before; nothing if these are no
    scores (batch, tokens, vocabulary) behind tokens."""
    if ids is None or scores.shape[:-1] != ids.shape or scores.dtype.kind != "f":
        return {}
    following = ids[:, 1:]
    if following.size and not 0 <= following.min() <= following.max() < scores.shape[-1]:
        return {}
    likelihoods = log_likelihoods(scores[:, :-1], np.ones(following.shape, bool), following.ravel())
    return {f"{name}{BEST}": scores.argmax(axis=-1), f"{name}{NEXT}": likelihoods.reshape(following.shape)}


def log_likelihoods(scores: np.ndarray, shown: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Log probabilities of ``words``, one for each row of ``scores`` (…, vocabulary) that is ``shown``, in order.

    Computed row by row in single precision, since vocabularies are large; sums are in double precision.
    """
    likelihoods = np.empty(words.shape, np.float64)
    for place, (row, word) in enumerate(zip(np.argwhere(shown), words, strict=True)):
        values = scores[tuple(row)].astype(np.float32, copy=False)
        shifted = values - values.max()
        likelihoods[place] = shifted[word] - np.log(np.exp(shifted).sum(dtype=np.float64))
    return likelihoods
