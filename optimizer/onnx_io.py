"""Reading ONNX files that may be broken or hostile, and writing files that load everywhere.

Advisories this is written against: CVE-2022-25882, CVE-2024-27318 and their successors (external data that leaves
the model's folder, by `..`, by an absolute path, or through links).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from planish.optimizer.errors import BadInput
from planish.optimizer.graph import NAME_SCOPES, embedded, graphs_of, weight_bytes
from planish.optimizer.tensors import origin_of

EXTERNAL_FROM = 1 << 20
"""Models with more bytes of weights than this keep them in a file beside the graph, where runtimes map them."""
ALIGNMENT = 1 << 16
"""Offset alignment of large tensors in that file: the mapping granularity of every system we know."""
SHARED_DATA = "model.onnx.data"
"""Where several graphs that are written together keep their weights."""
_SMALL = 1024
"""Tensors of at most this many bytes stay in the graph: runtimes want shape constants there."""
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "com.microsoft"})
_KEPT_METADATA = frozenset({NAME_SCOPES, "pkg.torch.onnx.class_hierarchy"})


def save(model: ir.Model, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``model`` to ``path``, weights in `<name>.data` beside it if they are large.

    Nothing of the building machine gets into the files: stack traces are dropped, the producer is Planish. Tensors
    are streamed one at a time; ``progress`` is told how many of how many are written.
    """
    released = strip_for_release(model)
    external = f"{path.name}.data" if weight_bytes(model) > EXTERNAL_FROM else None

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    if external is None:
        ir.save(embedded(released, EXTERNAL_FROM), path)
        return
    ir.save(
        released,
        path,
        external_data=external,
        size_threshold_bytes=_SMALL,
        alignment=ALIGNMENT,
        align_threshold=ALIGNMENT,
        callback=report,
    )


def save_together(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write several graphs, by file name, whose weights lie in one `model.onnx.data`: what they share lies there once.

    Tensors are the same if they are one object or refer to the same place; nothing is read to compare it.
    """
    released = {name: embedded(strip_for_release(model), _SMALL) for name, model in models.items()}
    values = [
        value
        for model in released.values()
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes > _SMALL
        and value.const_value.dtype is not ir.DataType.STRING
    ]
    tensors = {_identity(value.const_value): value.const_value for value in values if value.const_value is not None}
    written = ir.external_data.convert_tensors_to_external(
        list(tensors.values()), folder, SHARED_DATA, alignment=ALIGNMENT, align_threshold=ALIGNMENT
    )
    places = dict(zip(tensors, written, strict=True))
    for value in values:
        if value.const_value is not None:
            place = places[_identity(value.const_value)]
            value.const_value = ir.ExternalTensor(
                SHARED_DATA, place.offset, place.length, place.dtype, shape=place.shape, name=value.name or "",
                base_dir=folder,
            )  # fmt: skip
    for name, model in released.items():
        ir.save(model, folder / name)


def _identity(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for tensors that are known to hold the same."""
    origin = origin_of(tensor)
    return id(tensor) if origin is None else (repr(origin), tensor.dtype, tuple(tensor.shape))


def strip_for_release(model: ir.Model) -> ir.Model:
    """A copy that carries no trace of the machine it was made on and names Planish as its producer."""
    copy = model.clone()
    copy.producer_name = "planish"
    copy.producer_version = metadata.version("planish")
    copy.doc_string = None
    copy.metadata_props.clear()
    for graph in graphs_of(copy):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            for key in [key for key in node.metadata_props if key not in _KEPT_METADATA]:
                del node.metadata_props[key]
            value = node.attributes.get("value") if node.op_type == "Constant" else None
            if value is not None and not value.is_ref():  # libraries name it when they look at it
                value.as_tensor().name = node.outputs[0].name
        for made in _values(graph):
            made.metadata_props.clear()
            made.doc_string = None
    return copy


def load(path: Path) -> ir.Model:
    """Read an ONNX file; its external data stays where it is and is read when it is needed.

    BadInput if the file is missing, is not ONNX or is cut off, if external data is missing, short, linked or outside
    the file's folder, or if an operator or domain is unknown.
    """
    if not path.is_file():
        raise BadInput("there is no such file" if not path.exists() else "this is not a file", where=path)
    try:
        proto = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError):
        raise BadInput(
            "this is not an ONNX model, or it is cut off", where=path, advice="export it again, or copy it again whole"
        ) from None
    if not proto.HasField("graph") or not proto.graph.node:
        raise BadInput("this file holds no graph", where=path, advice="export it again, or copy it again whole")
    _check_external_data(proto, path)
    _check_operators(proto, path)
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ir.serde.SerdeError) as error:
        raise BadInput(f"this graph cannot be read: {error}", where=path) from error
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent)
    return model


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _tensors(proto: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from proto.initializer
    for node in proto.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(graph)


def _nodes(proto: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in proto.node:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(graph)


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    for tensor in _tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            _check_location(path, tensor, entries)


def _check_location(path: Path, tensor: onnx.TensorProto, entries: dict[str, str]) -> None:
    location = entries.get("location", "")
    data = path.parent / location
    where = f"{path}, tensor {tensor.name!r}"
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise BadInput(f"external data {location!r} lies outside the model's folder", where=where)
    if any(part.is_symlink() for part in (data, *data.parents) if path.parent in part.parents):
        raise BadInput(f"external data {location!r} is a symbolic link", where=where, advice="copy the real file here")
    if not data.is_file():
        raise BadInput(f"external data {location!r} is missing", where=where, advice="copy it beside the model")
    if data.stat().st_nlink > 1:
        raise BadInput(f"external data {location!r} is a hard link", where=where, advice="copy the real file here")
    _check_extent(data, tensor, entries, where)


def _check_extent(data: Path, tensor: onnx.TensorProto, entries: dict[str, str], where: str) -> None:
    dtype = ir.DataType(tensor.data_type)
    needed = (dtype.bitwidth * _product(tensor.dims) + 7) // 8
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError:
        raise BadInput("the offset or length of its external data is not a number", where=where) from None
    if offset < 0 or length != needed:
        raise BadInput(f"its external data has {length} bytes at {offset}, its shape needs {needed}", where=where)
    size = data.stat().st_size
    if offset + length > size:
        raise BadInput(
            f"external data {data.name!r} is too short: {size} bytes, {offset + length} are needed",
            where=where,
            advice="copy it again whole",
        )


def _product(dims: list[int]) -> int:
    product = 1
    for dim in dims:
        product *= dim
    return product


def _check_operators(proto: onnx.ModelProto, path: Path) -> None:
    functions = {(function.domain, function.name) for function in proto.functions}
    imported = {opset.domain: opset.version for opset in proto.opset_import}
    for node in _nodes(proto.graph):
        if (node.domain, node.op_type) in functions:
            continue
        name = node.name or next(iter(node.output), "?")
        if node.domain not in _KNOWN_DOMAINS:
            raise BadInput(
                f"operator {node.domain}::{node.op_type} of node {name!r} is of a domain that no target runs",
                where=path,
                advice=f"there are: {', '.join(sorted(d for d in _KNOWN_DOMAINS if d))} and the standard one",
            )
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, ""):
            raise BadInput(f"ONNX has no operator {node.op_type!r} (node {name!r})", where=path)
        if node.domain in ("", "ai.onnx") and not imported.keys() & {"", "ai.onnx"}:
            raise BadInput("the model does not say which opset it is written in", where=path)


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes only: no permissions, no times, no links."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(1 << 22):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
