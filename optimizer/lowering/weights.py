"""Weights as references: where each tensor lies in the checkpoint, and how to read it when somebody needs it.

Only the safetensors format is read: its header is data, a pickle is a program. Headers are checked before anything
is believed (format: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.tensors import lazy

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
}
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_HEADER_LIMIT = 100 << 20
_STRIP = 1 << 22
"""Elements that are converted and transposed at a time."""
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "tf_model.h5", "flax_model.msgpack")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, perhaps transposed and widened on its way out."""

    path: Path
    offset: int
    stored: ir.DataType
    stored_shape: tuple[int, ...]
    dtype: ir.DataType
    permutation: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after the permutation."""
        order = self.permutation or range(len(self.stored_shape))
        return tuple(self.stored_shape[axis] for axis in order)

    def read(self) -> np.ndarray:
        """Its values: a view of the mapped file if nothing changes, else an array of its own, made in strips.

        At no time is there more than that array and one strip.
        """
        if not self._count():
            return np.zeros(self.shape, _numpy(self.dtype))
        if self.permutation is None and self.dtype is self.stored:
            return self._mapped()
        found = np.empty(self.shape, _numpy(self.dtype))
        self.read_into(found)
        return found

    def read_into(self, found: np.ndarray) -> None:
        """Write its values into an array of its shape and of any type that holds those of its own, in strips."""
        count = self._count()
        if not count:
            return
        array = self._mapped()
        order = self.permutation or tuple(range(array.ndim))
        rows = max(1, _STRIP * len(array) // count) if array.ndim else 1
        for start in range(0, len(array) if array.ndim else 1, rows):
            strip = array[start : start + rows] if array.ndim else array
            place = tuple(slice(start, start + rows) if axis == 0 else slice(None) for axis in order)
            found[place] = strip.astype(_numpy(self.dtype), copy=False).transpose(order)

    def _count(self) -> int:
        return int(np.prod(self.stored_shape, dtype=np.int64))

    def _mapped(self) -> np.ndarray:
        array = np.frombuffer(_map(self.path), _numpy(self.stored), self._count(), self.offset)
        return array.reshape(self.stored_shape)

    def tensor(self, name: str) -> ir.LazyTensor:
        """An ONNX tensor that reads itself when asked."""
        return lazy(self.read, self.dtype, self.shape, name, origin=self)

    def transposed(self, permutation: tuple[int, ...]) -> Stored:
        """The same tensor with its axes in another order."""
        order = self.permutation or tuple(range(len(self.stored_shape)))
        return replace(self, permutation=tuple(order[axis] for axis in permutation))

    def widened(self) -> Stored:
        """The same tensor as float32 if it is stored as another floating type."""
        return replace(self, dtype=ir.DataType.FLOAT) if self.stored in _HALVES else self


def read_index(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in ``folder``, by its name in the files.

    BadInput if there are no safetensors, a shard is missing, or a header is cut off, garbage or lies.
    """
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of its index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _shards(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if found:
        raise BadInput(
            f"the weights are only here as {found[0]}, a format that can run code when it is read",
            where=folder,
            advice="load it once where you trust it and call save_pretrained(folder), which writes safetensors",
        )
    raise BadInput("there is no model.safetensors", where=folder, advice="give the folder of a whole checkpoint")


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"the shard index cannot be read ({error})", where=index) from error
    for name in names:
        if Path(name).name != name:
            raise BadInput(f"shard {name!r} lies outside the checkpoint's folder", where=index)
        if not (folder / name).is_file():
            raise BadInput(f"shard {name!r} is missing", where=folder, advice="download the checkpoint again, whole")
    files = [folder / name for name in names]
    present = {key for file in files for key in read_header(file)}
    absent = sorted(set(table) - present)
    if absent:
        raise BadInput(f"{len(absent)} tensors of the index are in no shard, {absent[0]!r} the first", where=index)
    return files


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of one file, after checking that the header describes the file that is there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise _broken(path, "its header is longer than the file")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header is not readable ({type(error).__name__}: {error})") from error
    _check_extents(path, tensors, 8 + length, size)
    return tensors


def _entry(path: Path, base: int, entry: dict[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(dim) for dim in entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown element type {entry['dtype']!r}")
    dtype = _DTYPES[entry["dtype"]]
    if any(dim < 0 for dim in shape) or begin < 0 or end - begin != _nbytes(dtype, shape):
        raise ValueError(f"a tensor of shape {shape} and type {entry['dtype']} cannot have {end - begin} bytes")
    return Stored(path, base + begin, dtype, shape, dtype)


def _check_extents(path: Path, tensors: dict[str, Stored], base: int, size: int) -> None:
    """The tensors must tile the rest of the file: no overlap, no gap, nothing beyond its end."""
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
    count = 1
    for dim in shape:
        count *= dim
    return count * dtype.bitwidth // 8


def _numpy(dtype: ir.DataType) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if dtype is ir.DataType.BFLOAT16 else np.dtype(dtype.numpy())


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _broken(path: Path, why: str) -> BadInput:
    return BadInput(f"this is not a whole safetensors file: {why}", where=path, advice="download it again")
