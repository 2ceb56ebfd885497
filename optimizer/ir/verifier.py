"""Structural invariants of a graph. All faults are collected, and each is printed under its node.

Checked: every value is defined once and before its use (static single assignment), names are unique, every operator
exists at the imported opset with a legal number of inputs and with attributes of its schema, initializers agree with
their values in type and shape, and types and shapes are consistent (by the standard's shape inference, on a copy
without weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from planish.optimizer.errors import CheckFailed, printable
from planish.optimizer.ir.graph import graphs_of, location_of, subgraphs_of
from planish.optimizer.ir.weightless import without_weights

_CONTEXT = 2
"""Nodes shown before and after a faulty one."""
_ELEMENT_TYPES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "softmax_precision"})
"""Attributes of standard operators that hold element types."""
_KNOWN_TYPES = frozenset(int(kind) for kind in ir.DataType)


@dataclass(frozen=True)
class Fault:
    """A violation, and its node (None if it belongs to an input or output of the graph)."""

    message: str
    node: ir.Node | None = None

    def __str__(self) -> str:
        """The message with its location."""
        return self.message if self.node is None else f"{location_of(self.node)}: {self.message}"


def faults_of(model: ir.Model) -> list[Fault]:
    """All faults of the model. Type and shape inference runs only if the cheap checks pass."""
    # Inference on an invalid structure can crash in C++ or report follow-up errors.
    return structural_faults(model) or list(_inference_faults(model))


def structural_faults(model: ir.Model) -> list[Fault]:
    """All faults that are detectable without type and shape inference."""
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    return [fault for root in roots for fault in _graph_faults(model, root, frozenset())]


def verify(model: ir.Model) -> None:
    """Raise CheckFailed with the first fault, and a picture of all of them, if the graph has faults."""
    faults = faults_of(model)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckFailed(f"the graph is not valid: {faults[0]}{more}", picture=picture(model, faults))


def picture(model: ir.Model, faults: list[Fault]) -> str:
    """The neighbourhood of each faulty node as text, with every fault on a line beneath its node."""
    by_node: dict[int, list[str]] = {}
    for fault in faults:
        by_node.setdefault(id(fault.node), []).append(fault.message)
    lines = [printable(f"  ^ {message}") for message in by_node.pop(id(None), [])]
    for graph in graphs_of(model):
        nodes = list(graph)
        marked = [index for index, node in enumerate(nodes) if id(node) in by_node]
        shown = sorted({near for at in marked for near in range(at - _CONTEXT, at + _CONTEXT + 1)})
        for index in (near for near in shown if 0 <= near < len(nodes)):
            lines.append(printable(f"{nodes[index]}"))
            lines += [printable(f"  ^ {message}") for message in by_node.get(id(nodes[index]), [])]
    return "\n".join(lines)


def _graph_faults(model: ir.Model, graph: ir.Graph | ir.Function, outer: frozenset[int]) -> Iterator[Fault]:
    """Faults of one graph and its subgraphs; ``outer`` are the values of enclosing graphs that it may read."""
    border = [*graph.inputs, *(graph.initializers.values() if isinstance(graph, ir.Graph) else ())]
    names: set[str] = set()
    defined = {id(value) for value in border} | outer
    for value in {id(value): value for value in border}.values():
        yield from _name_faults(value, names, None)
        yield from _initializer_faults(value)
    for node in graph:
        yield from (
            Fault(f"input {index} ({value.name!r}) is used before it is defined, or is not of this graph", node)
            for index, value in enumerate(node.inputs)
            if value is not None and id(value) not in defined
        )
        yield from _schema_faults(model, graph, node)
        for subgraph in subgraphs_of(node):
            yield from _graph_faults(model, subgraph, frozenset(defined))
        for value in node.outputs:
            yield from _name_faults(value, names, node)
            defined.add(id(value))
    yield from (
        Fault(f"output {value.name!r} of the graph is produced by nothing in it")
        for value in graph.outputs
        if id(value) not in defined
    )


def _name_faults(value: ir.Value, seen: set[str], node: ir.Node | None) -> Iterator[Fault]:
    if value.name is None:
        yield Fault("a value has no name", node)
    elif value.name in seen:
        yield Fault(f"the name {value.name!r} is defined twice", node)
    elif value.name:
        seen.add(value.name)


def _initializer_faults(value: ir.Value) -> Iterator[Fault]:
    tensor = value.const_value
    if tensor is None:
        return
    if value.dtype is not None and value.dtype != tensor.dtype:
        yield Fault(f"initializer {value.name!r} holds {tensor.dtype}, its value says {value.dtype}")
    if value.shape is not None and list(value.shape) != list(tensor.shape):
        yield Fault(f"initializer {value.name!r} has shape {tensor.shape}, its value says {value.shape}")


def _schema_faults(model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node) -> Iterator[Fault]:
    if node.op_identifier() in model.functions:
        return
    imports = graph.opset_imports if isinstance(graph, ir.Function) else model.opset_imports
    version = imports.get(node.domain)
    if version is None:
        yield Fault(f"the model imports no opset of domain {node.domain!r}", node)
        return
    if not onnx.defs.has(node.op_type, node.domain):
        if node.domain in ("", "ai.onnx"):
            yield Fault(f"ONNX has no operator {node.op_type}", node)
        return  # a domain whose schemas are not registered here: the runtime is the judge
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except (onnx.defs.SchemaError, TypeError):  # a version that is no C int
        yield Fault(f"{node.op_type} does not exist at opset {version}", node)
        return
    yield from _arity_faults(schema, node)
    yield from _attribute_faults(schema, node)


def _arity_faults(schema: onnx.defs.OpSchema, node: ir.Node) -> Iterator[Fault]:
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        yield Fault(f"has {len(node.inputs)} inputs, takes {schema.min_input} to {schema.max_input}", node)
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        yield Fault(f"has {len(node.outputs)} outputs, gives {schema.min_output} to {schema.max_output}", node)


def _attribute_faults(schema: onnx.defs.OpSchema, node: ir.Node) -> Iterator[Fault]:
    for name in sorted(set(node.attributes) - set(schema.attributes)):
        yield Fault(f"has no attribute {name!r}", node)
    for name, described in sorted(schema.attributes.items()):
        attribute = node.attributes.get(name)
        if attribute is None and described.required:
            yield Fault(f"attribute {name!r} is required", node)
        if attribute is not None and int(attribute.type) != int(described.type.value):
            yield Fault(f"attribute {name!r} is of type {attribute.type.name}, takes {described.type.name}", node)
    turned = node.attributes.get("perm") if node.op_type == "Transpose" else None
    if turned is not None and turned.type is ir.AttributeType.INTS and not turned.is_ref():
        axes = list(turned.as_ints())
        if sorted(axes) != list(range(len(axes))):
            yield Fault(f"attribute 'perm' is {axes}, which is no order of {len(axes)} axes", node)
    for name in sorted(_ELEMENT_TYPES & node.attributes.keys()):
        attribute = node.attributes[name]
        if attribute.type is ir.AttributeType.INT and not attribute.is_ref() and attribute.as_int() not in _KNOWN_TYPES:
            yield Fault(f"attribute {name!r} is {attribute.as_int()}, which is no element type", node)
    if node.op_type == "Constant" and len(node.attributes) != 1:
        yield Fault(f"a Constant has one value, this has {len(node.attributes)}", node)


def _inference_faults(model: ir.Model) -> Iterator[Fault]:
    """Run the standard's type and shape inference in strict mode, on a copy without large weights."""
    proto = ir.to_proto(without_weights(model))
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        # onnx reports the node only within its message text.
        named = [
            node for graph in model.graphs() for node in graph if node.name and f"node name: {node.name})" in message
        ]
        yield Fault(message[:400], named[0] if named else None)
