"""Annotations of a model that applications read: metadata, documentation, axis names of inputs and outputs.

They hold class names, strides, tokenizer facts and units. No pass changes them intentionally, but converters and
libraries rebuild nodes and outputs without them. A caller of such a step stores them before and restores them after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of the PyTorch exporter for the module path of a node, which is the source location in messages."""
ACTIVATION_GROUP = "planish.activation_group"
"""Metadata key of a model: the number of entries that share a step where the runtime rounds activations itself."""
_KEPT = frozenset({NAME_SCOPES, "pkg.torch.onnx.class_hierarchy"})
_OF_TOOLS = ("pkg.", "planish.")
"""Prefixes of the metadata keys of exporters (stack traces, internal names) and of our passes."""
_ABSOLUTE_PATH = re.compile(r"(^|[\s\"'(=,:\[])(?:/(?:[^\s/\"']+/)+|[A-Za-z]:\\(?:[^\s\\\"']+\\)*)")
"""The folders of an absolute path, after the character before it."""


@dataclass(frozen=True)
class _Note:
    """Documentation and metadata of one part of a model."""

    doc_string: str | None
    metadata: dict[str, str]

    @classmethod
    def of(cls, part: ir.Model | ir.Graph | ir.Node | ir.Value) -> _Note:
        return cls(part.doc_string, dict(part.metadata_props))

    def restore(self, part: ir.Model | ir.Graph | ir.Node | ir.Value) -> None:
        part.doc_string = part.doc_string or self.doc_string
        for key, text in self.metadata.items():
            part.metadata_props.setdefault(key, text)


@dataclass(frozen=True)
class Annotations:
    """The annotations of a model at one point of the pipeline."""

    model: _Note
    graph: _Note
    border: dict[str, tuple[_Note, ir.Shape | None]] = field(default_factory=dict)
    """Annotations and shapes of inputs and outputs, by name."""
    nodes: dict[tuple[str, str], _Note] = field(default_factory=dict)
    """Annotations of nodes that have any, by operator and name of the first output."""

    @classmethod
    def of(cls, model: ir.Model) -> Annotations:
        """Store the annotations of ``model``."""
        border = {value.name or "": (_Note.of(value), value.shape) for value in _border(model)}
        nodes = {_key(node): _Note.of(node) for node in model.graph if node.doc_string or node.metadata_props}
        return cls(_Note.of(model), _Note.of(model.graph), border, nodes)

    def restore(self, model: ir.Model) -> None:
        """Restore lost annotations. An axis gets its name back unless its size has become a number."""
        self.model.restore(model)
        self.graph.restore(model.graph)
        for value in _border(model):
            note, shape = self.border.get(value.name or "", (None, None))
            if note is not None:
                note.restore(value)
            if shape is not None and value.shape is None:
                value.shape = shape
            elif shape is not None and value.shape is not None and len(value.shape) == len(shape):
                value.shape = ir.Shape([_named(now, then) for now, then in zip(value.shape, shape, strict=True)])
        for node in model.graph:
            note = self.nodes.get(_key(node))
            if note is not None:
                note.restore(node)


def _key(node: ir.Node) -> tuple[str, str]:
    return node.op_type, (node.outputs[0].name or "") if node.outputs else ""


def _border(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.outputs


def _named(now: int | ir.SymbolicDim, then: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    named = isinstance(then, ir.SymbolicDim) and then.value is not None
    return then if named and not isinstance(now, int) else now


def strip_annotations(part: ir.Model | ir.Graph | ir.Function | ir.Node | ir.Value) -> None:
    """Remove the metadata of tools, and from documentation the absolute folder names of the exporting machine."""
    for key in [key for key in part.metadata_props if key.startswith(_OF_TOOLS) and key not in _KEPT]:
        del part.metadata_props[key]
    part.doc_string = _ABSOLUTE_PATH.sub(r"\1", part.doc_string or "") or None
