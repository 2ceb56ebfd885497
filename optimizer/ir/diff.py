"""Differences between two models: operators, inputs and outputs, types and shapes of values, initializers, size."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.graph import graphs_of, weight_bytes


@dataclass(frozen=True)
class Change:
    """One difference: its kind, the name, and the value in each model (None if it is absent)."""

    kind: str
    """`operators`, `inputs`, `outputs`, `values`, `initializers`, `opsets` or `size`."""
    name: str
    before: Any
    after: Any


def difference(before: ir.Model, after: ir.Model) -> list[Change]:
    """All differences, by kind and name. Weights of equal type and shape are read and compared."""
    kinds: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "size": (_sizes(before), _sizes(after)),
        "opsets": (dict(before.opset_imports), dict(after.opset_imports)),
        "operators": (_operators(before), _operators(after)),
        "inputs": (_types(before.graph.inputs), _types(after.graph.inputs)),
        "outputs": (_types(before.graph.outputs), _types(after.graph.outputs)),
        "values": _common(_types(_computed(before)), _types(_computed(after))),
        "initializers": _contents(before, after),
    }
    return [
        Change(kind, name, one.get(name), other.get(name))
        for kind, (one, other) in kinds.items()
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _sizes(model: ir.Model) -> dict[str, int]:
    return {"nodes": sum(1 for _ in model.graph.all_nodes()), "weight bytes": weight_bytes(model)}


def _operators(model: ir.Model) -> dict[str, int]:
    """Number of nodes of each operator in the model, its subgraphs and functions."""
    nodes = (node for graph in graphs_of(model) for node in graph)
    return Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    """Values of the main graph that a node computes, without graph outputs."""
    return (value for node in model.graph for value in node.outputs if not value.is_graph_output())


def _types(values: Iterable[ir.Value]) -> dict[str, str]:
    """Type and shape, as text, of the values that have both."""
    return {v.name: f"{v.dtype}{_dims(v.shape)}" for v in values if v.name and v.dtype and v.shape is not None}


def _dims(shape: ir.Shape) -> str:
    return f"[{','.join(str(dim) for dim in shape)}]"


def _common(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Entries of the names in both. A value that only one model computes shows in the operators."""
    shared = one.keys() & other.keys()
    return {name: one[name] for name in shared}, {name: other[name] for name in shared}


def _contents(before: ir.Model, after: ir.Model) -> tuple[dict[str, str], dict[str, str]]:
    """Type, shape and bytes of initializers; if these are equal in both, also a digest of the content."""
    texts = tuple({name: _described(tensor) for name, tensor in _tensors(model).items()} for model in (before, after))
    one, other = _tensors(before), _tensors(after)
    for name in one.keys() & other.keys():
        # Content is hashed only where type and shape agree: reading all weights of both models is slow.
        if texts[0][name] == texts[1][name] and one[name] is not other[name]:
            for text, tensor in zip(texts, (one[name], other[name]), strict=True):
                text[name] += f", SHA-256 {_digest(tensor)}"
    return texts[0], texts[1]


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    items = model.graph.initializers.items()
    return {name: value.const_value for name, value in items if value.const_value is not None}


def _described(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype}[{','.join(str(dim) for dim in tensor.shape)}], {tensor.nbytes} bytes"


def _digest(tensor: ir.TensorProtocol) -> str:
    """The first digits of a SHA-256 digest of the content. One tensor is in memory at a time."""
    if tensor.dtype is ir.DataType.STRING:
        return hashlib.sha256(repr(tensor.numpy().tolist()).encode()).hexdigest()[:12]
    return hashlib.sha256(tensor.tobytes()).hexdigest()[:12]


def compare_files(before: Path, after: Path) -> dict[str, list[Change]]:
    """The differences of two `.onnx` files, or of files of equal name in two folders, by file name.

    BadInput if only one folder has a file.
    """
    one, other = _files(before), _files(after)
    if len(one) == len(other) == 1:
        (first,), (second,) = one.values(), other.values()
        return {first.name: difference(onnx_io.load(first), onnx_io.load(second))}
    if one.keys() != other.keys():
        lone = sorted(one.keys() ^ other.keys())
        raise BadInput(f"only one of the two has {lone[0]}", where=f"{before}, {after}", advice="compare file by file")
    return {name: difference(onnx_io.load(one[name]), onnx_io.load(other[name])) for name in one}


def _files(path: Path) -> dict[str, Path]:
    """The ONNX files of a path: the file itself, or all files in and below a folder, by relative name."""
    if path.is_file():
        return {path.name: path}
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*.onnx"))}
    if not files:
        what = "there is no such file or folder" if not path.exists() else "there is no .onnx file in this folder"
        raise BadInput(what, where=path, advice="give .onnx files, or folders that hold some")
    return files
