"""Weights as references: the location of each tensor in the checkpoint, read when its values are needed.

Only safetensors files are read: their header is data, a pickle is a program. Headers are validated before use (format:
https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.lazy_tensors import lazy
from planish.optimizer.system.json_files import parse_json, read_object
from planish.optimizer.system.links import file_in

INDEX = "model.safetensors.index.json"
"""Index file: the shard of each tensor of a checkpoint."""
_DTYPES: dict[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "F8_E8M0": ir.DataType.FLOAT8E8M0,
}
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_HEADER_LIMIT = 100 << 20
_NUMBER_LIMIT = 1 << 63
_NAME_LIMIT = 255
"""Maximum bytes of a file name in common file systems."""
_STRIP = 1 << 22
"""Elements that are converted and transposed at a time."""
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "tf_model.h5", "flax_model.msgpack")


@dataclass(frozen=True)
class Weight(ABC):
    """A tensor that is read when its values are needed, with permuted axes."""

    dtype: ir.DataType = field(default=ir.DataType.FLOAT, kw_only=True)
    permutation: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """Shape before the permutation."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after the permutation."""
        return tuple(self.stored_shape[axis] for axis in self.order)

    @property
    def order(self) -> tuple[int, ...]:
        """The stored axis of each axis."""
        return self.permutation or tuple(range(len(self.stored_shape)))

    @abstractmethod
    def read(self) -> np.ndarray:
        """Its values, permuted; a read-only view of a file if nothing changes."""

    def read_into(self, array: np.ndarray) -> None:
        """Write its values into an array of its shape and of any type that can hold them."""
        array[...] = self.read()

    def strips(self) -> Iterator[np.ndarray]:
        """Its values piece by piece, in memory order."""
        yield self.read()

    def mapped(self) -> np.ndarray:
        """Its values before the permutation, without conversion if possible."""
        return replace(self, permutation=None).read()

    def widened(self) -> Weight:
        """The same tensor as float32 if it has another floating type."""
        return self

    def tensor(self, name: str) -> ir.LazyTensor:
        """A lazy ONNX tensor of these values."""
        return lazy(self.read, self.dtype, self.shape, name, origin=self, strips=self.strips)

    def transposed(self, permutation: tuple[int, ...]) -> Self:
        """The same tensor with its axes in another order."""
        return replace(self, permutation=tuple(self.order[axis] for axis in permutation))


@dataclass(frozen=True)
class Stored(Weight):
    """A tensor in a safetensors file, with permuted axes and an optional conversion to float32."""

    path: Path
    offset: int
    stored: ir.DataType
    shape_in_file: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape_in_file

    def read(self) -> np.ndarray:
        """Its values: a view of the mapped file if nothing changes, else a new array, filled strip by strip.

        Memory is that array and one strip.
        """
        stored = self.mapped()
        # A memory map of an empty file region is an error.
        if not stored.size:
            return np.zeros(self.shape, numpy_type(self.dtype))
        if self.permutation is None and self.dtype is self.stored:
            return stored
        array = np.empty(self.shape, numpy_type(self.dtype))
        self.read_into(array)
        return array

    def read_into(self, array: np.ndarray) -> None:
        """Write its values into an array, strip by strip."""
        # The target is viewed in stored order: reads from the file stay sequential.
        stored, turned = self.mapped(), array.transpose(np.argsort(self.order))
        for box in boxes(stored.shape):
            turned[box] = stored[box]

    def strips(self) -> Iterator[np.ndarray]:
        """Its values strip by strip; all at once if its rows are columns in the file."""
        if self.order[:1] not in ((), (0,)):
            yield self.read()
            return
        array = self.mapped().transpose(self.order)
        for box in boxes(array.shape):
            yield array[box].astype(numpy_type(self.dtype))

    def mapped(self) -> np.ndarray:
        """The stored values, unchanged."""
        count = math.prod(self.stored_shape)
        if not count:
            return np.zeros(self.stored_shape, numpy_type(self.stored))
        return np.frombuffer(_map(self.path), numpy_type(self.stored), count, self.offset).reshape(self.stored_shape)

    def widened(self) -> Stored:
        """The same tensor as float32 if it is stored as another floating type."""
        return replace(self, dtype=ir.DataType.FLOAT) if self.stored in _HALVES else self


Box = tuple[slice, ...]
"""A part of an array, as slices of its leading axes."""


def boxes(shape: Sequence[int], limit: int | None = None) -> Iterator[Box]:
    """Parts that tile an array of this shape, in memory order, each of about ``limit`` elements."""
    limit = _STRIP if limit is None else limit
    size = math.prod(shape)
    if size <= limit or not shape:
        yield ()
        return
    row = size // shape[0]
    if row > limit:
        yield from ((slice(i, i + 1), *box) for i in range(shape[0]) for box in boxes(shape[1:], limit))
        return
    step = limit // row
    yield from ((slice(i, min(i + step, shape[0])),) for i in range(0, shape[0], step))


def read_index(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in ``folder``, by its name in the files.

    BadInput without safetensors, for a missing shard, for two shards with one tensor, and for a truncated or invalid
    header.
    """
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of its index."""
    single = file_in(folder, "model.safetensors")
    if single is not None:  # transformers reads it also where there are shards beside it
        return [single]
    index = file_in(folder, INDEX)
    if index is not None:
        return _shards(folder, index)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise BadInput(
            f"the weights are only here as {pickles[0]}, a format that can run code when it is read",
            where=folder,
            advice="load it once where you trust it and call save_pretrained(folder), which writes safetensors",
        )
    raise BadInput("there is no model.safetensors", where=folder, advice="give the folder of a whole checkpoint")


def _shards(folder: Path, index: Path) -> list[Path]:
    content = read_object(index)
    table = content.get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise BadInput("the shard index has no weight_map from names of tensors to names of files", where=index)
    if not isinstance(content.get("metadata", {}), dict):  # transformers asks it for more than we do
        raise BadInput("the metadata of the shard index are no object", where=index)
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or len(os.fsencode(name)) > _NAME_LIMIT:
            raise BadInput(f"shard {name!r} lies outside the checkpoint's folder", where=index)
        if file_in(folder, name) is None:
            raise BadInput(f"shard {name!r} is missing", where=folder, advice="download the checkpoint again, whole")
    files = [folder / name for name in names]
    present: dict[str, str] = {}
    for file in files:
        for key in read_header(file):
            if key in present:
                raise BadInput(
                    f"tensor {key!r} lies in two shards, {present[key]!r} and {file.name!r}",
                    where=folder,
                    advice="download the checkpoint again, whole",
                )
            present[key] = file.name
    absent = sorted(set(table) - set(present))
    if absent:
        raise BadInput(f"{len(absent)} tensors of the index are in no shard, {absent[0]!r} the first", where=index)
    return files


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of one file, after validation of its header against the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise _broken(path, "its header is longer than the file")
        raw = file.read(length)
    try:
        header = parse_json(raw.decode("utf-8"), path)
        if not isinstance(header, dict):
            raise TypeError("it is no object")
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
    except (BadInput, ValueError, KeyError, TypeError) as error:
        why = error.what if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        raise _broken(path, f"its header is not readable ({why})") from error
    _check_extents(path, tensors, 8 + length, size)
    _check_with_the_library(path)
    return tensors


def _check_with_the_library(path: Path) -> None:
    """Raise BadInput if safetensors' own reader, with which the original is loaded, rejects the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return
    except SafetensorError as error:
        raise _broken(path, str(error)) from error


def _entry(path: Path, base: int, entry: dict[str, Any]) -> Stored:
    begin, end = _whole_numbers(entry["data_offsets"])
    shape = tuple(_whole_numbers(entry["shape"]))
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown element type {entry['dtype']!r}")
    dtype = _DTYPES[entry["dtype"]]
    if begin < 0 or end - begin != _nbytes(dtype, shape):
        raise ValueError(f"a tensor of shape {shape} and type {entry['dtype']} cannot have {end - begin} bytes")
    return Stored(path, base + begin, dtype, shape, dtype=dtype)


def _whole_numbers(items: object) -> list[int]:
    """The items of a list of sizes or offsets; Python would accept 4.0, true and Infinity as numbers."""
    if not isinstance(items, list) or not all(type(item) is int and 0 <= item < _NUMBER_LIMIT for item in items):
        raise TypeError(f"{items!r} is no list of sizes")
    return items


def _check_extents(path: Path, tensors: dict[str, Stored], base: int, size: int) -> None:
    """Raise BadInput unless the tensors tile the rest of the file: no overlap, no gap, nothing past its end."""
    position = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, _length(item[1]))):
        if tensor.offset + _length(tensor) > size:
            raise _broken(path, f"tensor {name!r} ends beyond the end of the file: the file is cut off")
        if tensor.offset != position:
            raise _broken(
                path,
                f"tensor {name!r} {'overlaps' if tensor.offset < position else 'leaves a gap after'} "
                "the tensor before it",
            )
        position += _length(tensor)
    if position != size:
        raise _broken(path, f"{size - position} bytes at its end belong to no tensor")


def _length(tensor: Stored) -> int:
    return _nbytes(tensor.stored, tensor.stored_shape)


def _nbytes(dtype: ir.DataType, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.bitwidth // 8


def numpy_type(dtype: ir.DataType) -> np.dtype[Any]:
    """The NumPy element type of this ONNX type."""
    return np.dtype(ml_dtypes.bfloat16) if dtype is ir.DataType.BFLOAT16 else np.dtype(dtype.numpy())


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _broken(path: Path, why: str) -> BadInput:
    return BadInput(f"this is not a whole safetensors file: {why}", where=path, advice="download it again")
