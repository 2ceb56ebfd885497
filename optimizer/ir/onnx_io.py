"""Reading of ONNX files that may be broken or malicious, and writing of files that every loader reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.annotations import strip_annotations
from planish.optimizer.ir.graph import graphs_of, weight_bytes
from planish.optimizer.ir.lazy_tensors import origin_of
from planish.optimizer.ir.onnx_checks import check_model
from planish.optimizer.ir.shape_inference import quiet_libraries
from planish.optimizer.ir.weightless import embedded

EXTERNAL_FROM = 1 << 20
"""Models with more bytes of weights than this have external data, which runtimes map."""
ALIGNMENT = 1 << 16
"""Offset alignment of large tensors in external data: the largest mapping granularity of common systems."""
SHARED_DATA = "model.onnx.data"
"""External data file of several graphs that are written together."""
_SMALL = 1024
"""Tensors of at most this many bytes stay in the graph, since runtimes need shape constants there."""


def save(model: ir.Model, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``model`` to ``path``, with large weights in `<name>.data` beside it.

    The files hold no data of the building machine: stack traces are removed, the producer is Planish. Tensors are
    streamed one at a time; ``progress`` gets the number of written tensors and the total.
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
    """Write several graphs, by file name, with their weights in one `model.onnx.data`; shared weights are stored once.

    Tensors are shared if they are one object or have the same origin. Their content is not compared.
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
    # One entry per content: tied weights of several components are written once.
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
    """A key that is equal for tensors known to have equal content."""
    origin = origin_of(tensor)
    return id(tensor) if origin is None else (repr(origin), tensor.dtype, tuple(tensor.shape))


def strip_for_release(model: ir.Model) -> ir.Model:
    """A copy without data of the building machine, with Planish as its producer.

    Metadata and documentation of users stay.
    """
    copy = model.clone()
    copy.producer_name = "planish"
    copy.producer_version = metadata.version("planish")
    strip_annotations(copy)
    for graph in graphs_of(copy):
        strip_annotations(graph)
        for node in graph:
            strip_annotations(node)
            value = node.attributes.get("value") if node.op_type == "Constant" else None
            # ir.convenience.get_const_tensor names the tensor of a Constant; equal builds must not depend on who called
            # it.
            if value is not None and not value.is_ref():  # libraries name it when they look at it
                value.as_tensor().name = node.outputs[0].name
        for result in _values(graph):
            strip_annotations(result)
    return copy


def load(path: Path) -> ir.Model:
    """Read an ONNX file. Its external data is read when it is needed.

    BadInput if the file is missing, is not ONNX, is truncated, or violates `onnx_checks`.
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
    check_model(proto, path)
    try:
        with quiet_libraries():
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


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes only: no permissions, times or links."""
    # shutil.copy would also copy the mode of the source, which may be read-only.
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(1 << 22):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
