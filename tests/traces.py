"""Stored results of torch.export for the tiny checkpoints of the tests: `pytest --update-traces` writes them.

A test that is not about lowering takes the graph of its checkpoint from `tests/data/traces.zip`. Its key covers what the
export depends on: versions, the source files that export, the module (classes, settings, shapes, buffers), the call with
its inputs. What is not stored is traced, which takes seconds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir import edit, graph, kv_cache
from planish.optimizer.ir.annotations import strip_annotations
from planish.optimizer.ir.program import Axis
from planish.optimizer.lowering.components import calls, rope
from planish.optimizer.lowering.export import torch_export
from planish.optimizer.lowering.export.layer_stacks import facts_of
from planish.optimizer.lowering.export.torch_export import PREFIX, Axes, Given

ARCHIVE = Path(__file__).parent / "data" / "traces.zip"
_SOURCES = tuple(Path(module.__file__ or "") for module in (torch_export, calls, rope, edit, graph, kv_cache))
_LIBRARIES = ("torch", "transformers", "onnxscript", "onnx", "onnx-ir", "numpy")
_DATE = (1980, 1, 1, 0, 0, 0)

export = torch_export.export
"""The export itself, before tests replace it."""


@dataclass
class Traces:
    """Answers `torch_export.export` from the archive, and counts what is not in it."""

    update: Path | None = None
    """The folder where traces that were used are collected for a new archive."""
    missing: list[str] = field(default_factory=list)
    """Classes of modules that were traced although a trace could be stored."""

    def export(
        self, module: Any, call: Any, inputs: Mapping[str, Any], axes: Axes, outputs: Sequence[str]
    ) -> tuple[ir.Model, dict[str, Axis], Given]:
        """As `torch_export.export`, from the archive where it has the result."""
        if not all(type(part).__module__.startswith(("transformers.", "torch.")) for part in module.modules()):
            return export(module, call, inputs, axes, outputs)  # the code of a test's own module has no version
        name = key_of(module, call, inputs, axes, outputs)
        text = self.stored.get(name)
        if text is None:
            self.missing.append(type(module).__name__)
            try:
                text = packed(module, *export(module, call, inputs, axes, outputs))
            except BadInput as error:  # lowering tries in several ways
                text = json.dumps({"refused": error.what, "advice": error.advice}).encode()
        if self.update is not None:
            staged = self.update / f"{name}.{os.getpid()}"
            staged.write_bytes(text)
            staged.replace(self.update / name)  # another worker may write the same
        return unpacked(text)

    @cached_property
    def stored(self) -> dict[str, bytes]:
        """The archive: results by their keys."""
        if not ARCHIVE.is_file():
            return {}
        with zipfile.ZipFile(ARCHIVE) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def write_archive(folder: Path) -> None:
    """Replace the archive by the traces in a folder; the same traces give the same bytes."""
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(path.name, _DATE), path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


def key_of(module: Any, call: Any, inputs: Mapping[str, Any], axes: Axes, outputs: Sequence[str]) -> str:
    """A hash of all that the export of a module of transformers depends on, except values of parameters."""
    facts = [
        versions(),
        call.__name__,
        [
            (name, str(tensor.dtype), tuple(tensor.shape), tensor.flatten()[:1].tolist())
            for name, tensor in inputs.items()
        ],
        {name: dict(by_index) for name, by_index in axes.items()},
        list(outputs),
        {key: value for key, value in module.config.to_dict().items() if key != "_name_or_path"},
        getattr(module.config, "_attn_implementation", None),
        [(name, str(parameter.dtype), parameter.is_meta) for name, parameter in module.named_parameters()],
        [(name, str(buffer.dtype)) for name, buffer in module.named_buffers()],
        [
            (
                path,
                type(part).__module__,
                type(part).__qualname__,
                sorted((facts_of(part) | {"name_or_path": ""}).items()),
            )
            for path, part in module.named_modules()
        ],
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@cache
def versions() -> tuple[str, ...]:
    """Versions of the libraries that export, and hashes of our files that do."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*_SOURCES, Path(__file__))]
    return *map(importlib.metadata.version, _LIBRARIES), *hashes


def packed(module: Any, model: ir.Model, ranges: Mapping[str, Axis], given: Given) -> bytes:
    """The result of an export as bytes; parameters, which lowering binds by name, without their data."""
    parameters = {PREFIX + name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name in parameters and tensor is not None:
            value.const_value = ir.ExternalTensor(
                "parameters", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
    for part in model.graphs():
        for node in part:
            strip_annotations(node)  # they name files of this machine, and lowering does not read them
            for output in node.outputs:
                strip_annotations(output)
    described = {name: [axis.minimum, axis.maximum] for name, axis in ranges.items()}
    header = json.dumps({"ranges": described, "chosen": given.chosen, "left_out": given.left_out})
    return header.encode() + b"\n" + bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def unpacked(text: bytes) -> tuple[ir.Model, dict[str, Axis], Given]:
    """The result of an export from its bytes; BadInput where it was refused."""
    header, _, body = text.partition(b"\n")
    facts = json.loads(header)
    if "refused" in facts:
        raise BadInput(facts["refused"], advice=facts["advice"])
    ranges = {name: Axis(name, *limits) for name, limits in facts["ranges"].items()}
    given = Given(tuple(facts["chosen"]), tuple(facts["left_out"]))
    return ir.from_proto(onnx.load_from_string(body)), ranges, given
