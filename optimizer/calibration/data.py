"""The user's inputs as cases: texts through the tokenizer, or arrays by name."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.ir.program import Role, Signature
from planish.optimizer.runtime.array_files import fitted, implied_arrays, read_arrays
from planish.optimizer.runtime.batching import BatchLimits
from planish.optimizer.runtime.cases import Case
from planish.optimizer.system.json_files import parse_json
from planish.optimizer.system.text_lines import decoded_lines

_BATCH = 4
_CASES = 8
"""Maximum number of reference cases: one long, one single, the others padded batches."""
_HELD_OUT = _BATCH * _CASES
"""Number of reference texts. Later texts are calibration data, if there are at least as many."""
NOT_OBSERVED = "no pass that was asked for sees activations, so nothing is calibrated"
"""Reason for refusing calibration data, or their number."""
SAMPLES = 256
"""Default number of calibration texts."""

Given = str | Path | Iterable[str] | Iterable[Case]
"""A `.txt` or `.jsonl` file of texts or an `.npz` file of arrays by input name; or texts or arrays themselves."""


@dataclass(frozen=True)
class Samples:
    """The user's inputs: the first are the reference of accuracy checks, the rest is calibration data.

    Files are read again at each use, one text at a time, so memory does not depend on their length.
    """

    source: Path | tuple[str | Case, ...]
    count: int = SAMPLES
    """Maximum number of calibration cases."""

    @classmethod
    def of(cls, given: Given, count: int | None = None) -> Samples:
        """The checked inputs. At most the required number of items of an iterable is consumed."""
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
        """The reference cases. BadInput for missing or empty data, wrong keys or types, or texts without a
        tokenizer."""
        arrays = self._arrays(signature)
        if arrays is not None:
            return arrays[:_CASES]
        return batches_of(list(itertools.islice(self._texts(tokenizer), _HELD_OUT)), signature, tokenizer)

    def batches(self, signature: Signature, tokenizer: Any | None) -> Iterator[Case]:
        """The calibration cases; the reference cases if there are fewer than twice as many."""
        arrays = self._arrays(signature)
        if arrays is not None:
            yield from arrays[_CASES:] if len(arrays) >= 2 * _CASES else arrays
            return
        enough = sum(1 for _ in itertools.islice(self._texts(tokenizer), 2 * _HELD_OUT)) == 2 * _HELD_OUT
        # With few texts, better calibrate on the reference texts than on a handful.
        first = _HELD_OUT if enough else 0
        texts = itertools.islice(self._texts(tokenizer), first, first + self.count)
        while group := list(itertools.islice(texts, _BATCH)):
            yield from batches_of(group, signature, tokenizer)

    def digest(self) -> str:
        """SHA-256 of the data and of the maximum number of cases."""
        digest = hashlib.sha256(str(self.count).encode())
        if isinstance(self.source, Path):
            with self.source.open("rb") as file:
                # Data may be larger than memory.
                while block := file.read(1 << 20):
                    digest.update(block)
        for case in () if isinstance(self.source, Path) else self.source:
            parts = [case.encode()] if isinstance(case, str) else [np.asarray(case[n]).tobytes() for n in sorted(case)]
            for part in parts:
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def _arrays(self, signature: Signature) -> list[Case] | None:
        """The cases of arrays; None for texts."""
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
    """``longest`` filled with the tokens of all given texts, repeated to its length. Random tokens would be outside of
    the calibrated ranges, and give larger errors than texts do."""
    tokens = [tensor.name for tensor in signature.inputs if tensor.role is Role.TOKENS]
    mask = signature.mask()
    if mask is None or len(tokens) != 1 or len(mask.shape) != 2:
        return longest
    (name,) = tokens
    shown = [(case[name], case[mask.name][:, -case[name].shape[1] :] != 0) for case in given]
    tokens_of_texts = np.concatenate([ids[visible] for ids, visible in shown])
    return {**longest, name: np.resize(tokens_of_texts, longest[name].shape).astype(longest[name].dtype)}


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: one per line, or the field `text` (or the only field) of each JSON line. BadInput if
    empty."""
    count = 0
    with path.open("rb") as file:
        for number, line in decoded_lines(file, path):
            count += 1
            yield _text_of(line, path, number) if path.suffix == ".jsonl" else line
    if not count:
        raise BadInput("this file holds no text", where=path)


def _text_of(line: str, path: Path, number: int) -> str:
    record = parse_json(line, f"{path}, line {number}")
    if isinstance(record, dict):
        record = record.get("text", next(iter(record.values())) if len(record) == 1 else None)
    if not isinstance(record, str):
        raise BadInput("this line has no field 'text'", where=f"{path}, line {number}")
    return record


def batches_of(texts: Sequence[str], signature: Signature, tokenizer: Any) -> list[Case]:
    """Tokenize texts into cases of the engine's inputs: the first text alone, the others in padded batches."""
    room = BatchLimits.of(signature)
    # A single text has no padding: the reference must hold both kinds of batches.
    groups = [texts[:1], *(texts[start : start + _BATCH] for start in range(1, len(texts), _BATCH))]
    fitting = [part for group in groups if group for part in room.groups(group)]
    return [tokenize(room.filled(part), signature, tokenizer, room.tokens.maximum) for part in fitting]


def tokenize(texts: Sequence[Any], signature: Signature, tokenizer: Any, longest: int | None) -> dict[str, np.ndarray]:
    """One padded batch; texts are truncated to ``longest`` tokens."""
    encoded = tokenizer(list(texts), **BatchLimits.of(signature).padding(longest))
    wanted = {tensor.name: tensor.numpy_dtype() for tensor in signature.inputs}
    implied = (Role.SEGMENTS, Role.POSITIONS, Role.CACHE)  # a mask is not: there is padding
    absent = sorted(t.name for t in signature.inputs if t.name not in encoded and t.role not in implied)
    if absent:
        raise BadInput(f"the tokenizer gives no {absent[0]!r}", advice="give an .npz file of arrays")
    arrays = {name: np.asarray(encoded[name]) for name in wanted if name in encoded}
    arrays |= implied_arrays(arrays, signature)
    return {name: array.astype(wanted[name], copy=False) for name, array in arrays.items()}
