"""Validation of untrusted ONNX files before a graph is built from them: one BadInput for each kind of violation.

`onnx_ir` and the runtimes read lazily. A tensor with too few bytes, an attribute without a value or a name that is not
UTF-8 would raise at its first use, deep inside a pass. All checks run here, once. Of external data only booleans are
read.

Relevant advisories: CVE-2022-25882, CVE-2024-27318 and their successors (external data outside the model's folder, by
`..`, by an absolute path, or through links).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from planish.optimizer.errors import BadInput

_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "com.microsoft"})
_LARGEST_VERSION = 1 << 30
"""onnx stores opset versions in a C int."""
_IN_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.COMPLEX64})
_IN_DOUBLES = frozenset({ir.DataType.DOUBLE, ir.DataType.COMPLEX128})
_IN_UNSIGNED = frozenset({ir.DataType.UINT32, ir.DataType.UINT64})
_COMPLEX = frozenset({ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})
_VALUE_OF = {
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}
"""Attribute types whose field is required; numbers and strings have a default."""
_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_SPARSE = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)


def check_model(proto: onnx.ModelProto, path: Path) -> None:
    """BadInput for names that are not UTF-8, unknown operators, domains and opsets, attributes without a value, and
    tensors whose bytes (in the file or external) do not match their shape."""
    _check_text(proto, path)
    _check_versions(proto, path)
    for graph in (proto.graph, *proto.functions):
        for node in _nodes(graph):
            _check_attributes(node, path, inside_function=isinstance(graph, onnx.FunctionProto))
        for tensor in _tensors(graph):
            _check_tensor(tensor, path)
    _check_operators(proto, path)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph or function, and all subgraphs in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    for each in _graphs(graph):
        yield from each.node


def _tensors(graph: Any) -> Iterator[onnx.TensorProto]:
    for each in _graphs(graph):
        if isinstance(each, onnx.GraphProto):
            yield from each.initializer
        for attribute in (attribute for node in each.node for attribute in node.attribute):
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors


def _name_of(node: onnx.NodeProto) -> str:
    return repr(node.name or next(iter(node.output), "?"))


def _check_text(message: Any, path: Path) -> None:
    """Reject strings that are not UTF-8; protocol buffers return them as bytes."""
    pending = [message]
    while pending:
        for field, value in pending.pop().ListFields():
            if field.type == field.TYPE_MESSAGE:
                pending += value if isinstance(value, list) or hasattr(value, "append") else [value]
            elif field.type == field.TYPE_STRING:
                texts = [value] if isinstance(value, str | bytes) else value
                broken = next((text for text in texts if isinstance(text, bytes)), None)
                if broken is not None:
                    raise BadInput(f"{field.name} {broken[:80]!r} is not UTF-8", where=path)


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    for opset in (*proto.opset_import, *(each for function in proto.functions for each in function.opset_import)):
        most = newest if opset.domain in ("", "ai.onnx") else _LARGEST_VERSION
        if not 0 < opset.version <= most:
            raise BadInput(
                f"there is no opset {opset.version} of domain {opset.domain!r}",
                where=path,
                advice=f"onnx {onnx.__version__} knows up to opset {newest} of the standard; export it again",
            )


def _check_attributes(node: onnx.NodeProto, path: Path, *, inside_function: bool) -> None:
    names: set[str] = set()
    for attribute in node.attribute:
        where = f"{path}, node {_name_of(node)}, attribute {attribute.name!r}"
        if attribute.name in names:
            raise BadInput("this attribute is there twice", where=where)
        names.add(attribute.name)
        field = _VALUE_OF.get(attribute.type)
        if field is not None and not attribute.ref_attr_name and not attribute.HasField(field):
            raise BadInput("this attribute has no value of the type that it says it has", where=where)
        if attribute.ref_attr_name and not inside_function:
            raise BadInput("only in a function can this be an attribute of the function", where=where)
        if attribute.type in _SPARSE:
            raise BadInput("sparse tensors are not read", where=where, advice="export it with dense ones")


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    where = f"{path}, tensor {tensor.name!r}"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise BadInput(f"there is no element type {tensor.data_type}", where=where) from None
    if dtype is ir.DataType.UNDEFINED:
        raise BadInput("its element type is not said", where=where)
    if any(size < 0 for size in tensor.dims):
        raise BadInput(f"its shape {list(tensor.dims)} has a negative size", where=where)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(path, tensor, dtype, where)
    else:
        _check_content(tensor, dtype, where)


def _check_content(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    """Check that the number of bytes, or of entries in the typed field, matches the shape."""
    count = math.prod(tensor.dims)
    fields = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
    if dtype is not ir.DataType.STRING and not fields and (tensor.HasField("raw_data") or not count):
        given, needed, unit = len(tensor.raw_data), (count * dtype.bitwidth + 7) // 8, "bytes"
    else:
        field, needed = _field_of(dtype, count)
        given, unit = len(getattr(tensor, field)), f"entries in {field}"
        if set(fields) - {field} or tensor.HasField("raw_data"):
            raise BadInput(f"it holds {dtype} in {', '.join(fields) or 'raw_data'}, not in {field} alone", where=where)
    if given != needed:
        raise BadInput(
            f"it holds {given} {unit}, its type and shape {list(tensor.dims)} need {needed}",
            where=where,
            advice="export it again, or copy it again whole",
        )
    if dtype is ir.DataType.BOOL:
        _check_truths(np.array(tensor.int32_data) if fields else np.frombuffer(tensor.raw_data, np.uint8), where)


def _check_truths(entries: np.ndarray, where: str) -> None:
    """Reject booleans other than 0 and 1, since runtimes interpret them differently."""
    other = entries[(entries != 0) & (entries != 1)]
    if other.size:
        raise BadInput(f"an entry of this BOOL is {other[0]}, neither 0 nor 1", where=where)


def _field_of(dtype: ir.DataType, count: int) -> tuple[str, int]:
    """The typed field for numbers of this type, and the number of its entries (onnx.proto, TensorProto)."""
    if dtype is ir.DataType.STRING:
        return "string_data", count
    if dtype in _IN_FLOATS or dtype in _IN_DOUBLES:
        return "float_data" if dtype in _IN_FLOATS else "double_data", count * (2 if dtype in _COMPLEX else 1)
    if dtype in _IN_UNSIGNED or dtype is ir.DataType.INT64:
        return "uint64_data" if dtype in _IN_UNSIGNED else "int64_data", count
    return "int32_data", -(-count * min(dtype.bitwidth, 8) // 8)


def _check_external(path: Path, tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = Path(location).parts
    if dtype is ir.DataType.STRING:
        raise BadInput("strings cannot lie in external data", where=where)
    if not parts or Path(location).is_absolute() or ".." in parts:
        raise BadInput(f"external data {location!r} lies outside the model's folder", where=where)
    data = path.parent / location
    try:
        linked = any(part.is_symlink() for part in (data, *data.parents) if path.parent in part.parents)
        present = data.is_file() and not location.endswith("/")
    except (OSError, ValueError) as error:  # a name too long for the file system, or with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"external data {location!r} cannot be looked for ({reason})", where=where) from error
    if linked:
        raise BadInput(f"external data {location!r} is a symbolic link", where=where, advice="copy the real file here")
    if not present:
        raise BadInput(f"external data {location!r} is missing", where=where, advice="copy it beside the model")
    if data.stat().st_nlink > 1:
        raise BadInput(f"external data {location!r} is a hard link", where=where, advice="copy the real file here")
    needed = (math.prod(tensor.dims) * dtype.bitwidth + 7) // 8
    _check_extent(data, needed, entries, where)
    if dtype is ir.DataType.BOOL and needed:
        _check_truths(np.memmap(data, np.uint8, "r", int(entries.get("offset", 0)), (needed,)), where)


def _check_extent(data: Path, needed: int, entries: dict[str, str], where: str) -> None:
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


def _check_operators(proto: onnx.ModelProto, path: Path) -> None:
    functions = {(function.domain, function.name) for function in proto.functions}
    imported = {opset.domain: opset.version for opset in proto.opset_import}
    for node in (node for graph in (proto.graph, *proto.functions) for node in _nodes(graph)):
        if (node.domain, node.op_type) in functions:
            continue
        name = _name_of(node)
        if node.domain not in _KNOWN_DOMAINS:
            raise BadInput(
                f"operator {f'{node.domain}::{node.op_type}'!r} of node {name} is of a domain that no target runs",
                where=path,
                advice=f"there are: {', '.join(sorted(d for d in _KNOWN_DOMAINS if d))} and the standard one",
            )
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, ""):
            raise BadInput(f"ONNX has no operator {node.op_type!r} (node {name})", where=path)
        if node.domain in ("", "ai.onnx") and not imported.keys() & {"", "ai.onnx"}:
            raise BadInput("the model does not say which opset it is written in", where=path)
