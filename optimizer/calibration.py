"""The user's own inputs as cases: texts through the tokenizer, or arrays by name."""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.backend import nothing
from planish.optimizer.compare import Case
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.fitting import Room
from planish.optimizer.json_files import parse_json
from planish.optimizer.program import SIGNALS, SUM, Axis, Role, Signature, TensorSpec
from planish.optimizer.reference import positions_of
from planish.optimizer.text_files import decoded_lines

_BATCH = 4
_CASES = 8
"""At most this many cases serve as reference: one long, one single, the others padded batches."""
_HELD_OUT = _BATCH * _CASES
"""Texts that serve as reference; those behind them are calibrated on, if there are as many again."""
NOT_OBSERVED = "no pass that was asked for sees activations, so nothing is calibrated"
"""Why data that are calibrated on, or their number, are refused."""
SAMPLES = 256
"""Texts that are calibrated on, unless another number is asked for."""

Given = str | Path | Iterable[str] | Iterable[Case]
"""A `.txt` or `.jsonl` file of texts or an `.npz` file of arrays by input name; or texts or arrays themselves."""


@dataclass(frozen=True)
class Samples:
    """The user's own inputs: the first are the reference that engines are held against, the rest is calibrated on.

    Files are read anew each time, a text at a time: what is in memory does not grow with their length.
    """

    source: Path | tuple[str | Case, ...]
    count: int = SAMPLES
    """At most so many are calibrated on."""

    @classmethod
    def of(cls, given: Given, count: int | None = None) -> Samples:
        """What was given, checked; of an iterable no more is taken than is needed."""
        asked, count = count, SAMPLES if count is None else count
        if isinstance(given, str | Path):
            if not Path(given).is_file():
                raise BadInput("there is no such file", where=given)
            if asked is not None and Path(given).suffix == ".npz":
                raise UsageError("all rows of an .npz file are taken", where="--samples", advice="leave it out")
            return cls(Path(given), count)
        taken: tuple[str | Case, ...] = tuple(itertools.islice(given, _HELD_OUT + count))
        if not taken:
            raise BadInput("the calibration data hold nothing", advice="give texts, or arrays by input name")
        return cls(taken, count)

    def reference(self, signature: Signature, tokenizer: Any | None) -> list[Case]:
        """The cases that engines are held against. BadInput if data are missing, empty, have the wrong keys or types,
        or are texts and there is no tokenizer."""
        arrays = self._arrays(signature)
        if arrays is not None:
            return arrays[:_CASES]
        return batches_of(list(itertools.islice(self._texts(tokenizer), _HELD_OUT)), signature, tokenizer)

    def batches(self, signature: Signature, tokenizer: Any | None) -> Iterator[Case]:
        """The cases that are calibrated on; those of the reference if there are not twice as many."""
        arrays = self._arrays(signature)
        if arrays is not None:
            yield from arrays[_CASES:] if len(arrays) >= 2 * _CASES else arrays
            return
        enough = sum(1 for _ in itertools.islice(self._texts(tokenizer), 2 * _HELD_OUT)) == 2 * _HELD_OUT
        first = _HELD_OUT if enough else 0
        texts = itertools.islice(self._texts(tokenizer), first, first + self.count)
        while group := list(itertools.islice(texts, _BATCH)):
            yield from batches_of(group, signature, tokenizer)

    def digest(self) -> str:
        """SHA-256 of the data and of how many are taken."""
        found = hashlib.sha256(str(self.count).encode())
        if isinstance(self.source, Path):
            with self.source.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
        for case in () if isinstance(self.source, Path) else self.source:
            parts = [case.encode()] if isinstance(case, str) else [np.asarray(case[n]).tobytes() for n in sorted(case)]
            for part in parts:
                found.update(len(part).to_bytes(8, "little") + part)
        return found.hexdigest()

    def _arrays(self, signature: Signature) -> list[Case] | None:
        """Nothing if these are texts."""
        if isinstance(self.source, Path):
            return [read_arrays(self.source, signature)] if self.source.suffix == ".npz" else None
        if isinstance(self.source[0], str):
            return None
        where = "calibration data"
        if not all(isinstance(case, Mapping) for case in self.source):
            raise BadInput("some of them are arrays by name, others are not", where=where)
        return [fitted(dict(case), signature, where) for case in self.source if isinstance(case, Mapping)]

    def _texts(self, tokenizer: Any | None) -> Iterator[str]:
        if tokenizer is None:
            where = self.source if isinstance(self.source, Path) else "calibration data"
            raise BadInput(
                "texts need a tokenizer, and the source brings none", where=where, advice="give an .npz file of arrays"
            )
        if isinstance(self.source, Path):
            yield from read_texts(self.source)
            return
        for number, text in enumerate(self.source):
            if not isinstance(text, str):
                raise BadInput(f"it is {type(text).__name__}, not a text", where=f"calibration data, entry {number}")
            yield text


def one_behind_the_other(given: Sequence[Case], longest: Case, signature: Signature) -> Case:
    """``longest`` with the tokens of all given texts in it, as often as they fit: made-up ones are like nobody's texts,
    and what was calibrated on texts makes more of them than of those."""
    tokens = [tensor.name for tensor in signature.inputs if tensor.role is Role.TOKENS]
    mask = signature.mask()
    if mask is None or len(tokens) != 1 or len(mask.shape) != 2:
        return longest
    (name,) = tokens
    shown = [(case[name], case[mask.name][:, -case[name].shape[1] :] != 0) for case in given]
    known = np.concatenate([ids[visible] for ids, visible in shown])
    return {**longest, name: np.resize(known, longest[name].shape).astype(longest[name].dtype)}


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: one a line, or the field `text` (or the only field) of each JSON line; never none."""
    found = 0
    with path.open("rb") as file:
        for number, line in decoded_lines(file, path):
            found += 1
            yield _text_of(line, path, number) if path.suffix == ".jsonl" else line
    if not found:
        raise BadInput("this file holds no text", where=path)


def _text_of(line: str, path: Path, number: int) -> str:
    record = parse_json(line, f"{path}, line {number}")
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
    implied = (Role.SEGMENTS, Role.POSITIONS, Role.CACHE)  # a mask is not: there is padding
    absent = sorted(t.name for t in signature.inputs if t.name not in encoded and t.role not in implied)
    if absent:
        raise BadInput(f"the tokenizer gives no {absent[0]!r}", advice="give an .npz file of arrays")
    made = {name: np.asarray(encoded[name]) for name in wanted if name in encoded}
    made |= _beside(made, signature)
    return {name: array.astype(wanted[name], copy=False) for name, array in made.items()}


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
    found = {**found, **_beside(found, signature)}
    for tensor in signature.inputs:
        if tensor.name not in found:
            raise BadInput(f"it has no array {tensor.name!r}; it has {sorted(found)}", where=where)
        _refuse_misfit(np.asarray(found[tensor.name]), tensor, where)
    arrays = {tensor.name: np.asarray(found[tensor.name], tensor.numpy_dtype()) for tensor in signature.inputs}
    _refuse_other_sizes(arrays, signature, where)
    return arrays


def _beside(found: Mapping[str, Any], signature: Signature) -> dict[str, np.ndarray]:
    """What follows from token ids, shape (texts, tokens), and is not there: a mask of ones, segments of zeros, and
    behind nothing an empty cache and positions that count what the mask shows."""
    ids = next((np.asarray(found[t.name]) for t in signature.inputs if t.role is Role.TOKENS and t.name in found), None)
    if ids is None or ids.ndim != 2 or any(t.role is Role.CACHE and t.name in found for t in signature.inputs):
        return {}
    mask, ones = signature.mask(), np.ones_like(ids)
    shown = ones if mask is None else np.asarray(found.get(mask.name, ones))
    counted = positions_of(shown if shown.shape == ids.shape else ones)  # a mask that does not fit is refused later
    values = {Role.MASK: ones, Role.SEGMENTS: np.zeros_like(ids), Role.POSITIONS: counted}
    absent = [tensor for tensor in signature.inputs if tensor.name not in found]
    plain = {t.name: values[t.role] for t in absent if t.role in values and len(t.shape) == ids.ndim}
    return plain | {t.name: nothing(t, {"input_ids": ids}) for t in absent if t.role is Role.CACHE}


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
