"""Compute in 16 bits, but for what would overflow or lose too much there.

Before:  y = MatMul (x, w);  z = Softmax (y);  r = MatMul (z, v)
After:   h = Cast <to=10> (x);  y = MatMul (h, w16);  f = Cast <to=1> (y);  z = Softmax (f)
         g = Cast <to=10> (z);  o = MatMul (g, v16);  r = Cast <to=1> (o)

1. An operator stays in float if it is named, holds a subgraph, or has no 16-bit form in the standard.
2. It stays in float if a weight, or what was seen of an activation, comes near the largest number of the type.
3. Scales of integers are converted to float16 if none is below its smallest normal number; bfloat16 is too coarse for
   them, and they stay in float.
4. Inputs and outputs of the model keep their types.

Micikevicius et al. 2018, "Mixed Precision Training", section 3: sums of many terms keep 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeGuard

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from planish.optimizer.interfaces.observers import HistogramObserver, statistic_of
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, StatisticRequest, admitted
from planish.optimizer.ir.edit import add_initializer, copy_location, forget_unread
from planish.optimizer.ir.graph import location_of, sizes_of, subgraphs_of
from planish.optimizer.ir.lazy_tensors import lazy

_TYPES = {
    "float16": (ir.DataType.FLOAT16, np.float16, float(np.finfo(np.float16).max)),
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16, float(ir.DataType.BFLOAT16.max)),
}
_MARGIN = 4.0
"""How far below the largest number what was seen must stay: other inputs reach further."""
_ALWAYS = ("Cast", "CastLike", "Constant", "ConstantOfShape", "DynamicQuantizeLinear")
"""Operators whose types are a matter of their own."""
_STEPS = ("QuantizeLinear", "DequantizeLinear")
"""Between floats and integers: a runtime that multiplies integers wants no Cast between these and a product."""


@dataclass(frozen=True)
class ConvertFloat16(Pass):
    """Give operators of the main graph 16-bit operands and results, one by one."""

    name: ClassVar[str] = "convert-float16"
    exact: ClassVar[bool] = False

    type: Literal["float16", "bfloat16"] = "float16"
    """Of 16 bits, float16 has 10 for the fraction and bfloat16 7; bfloat16 reaches as far as float."""

    keep: tuple[str, ...] = (
        "LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceSumSquare",
        "ReduceL2", "Pow", "Exp", "Log", "Range", "CumSum",
    )  # fmt: skip
    """Operators that stay in float: sums of many terms, and what grows fast."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """The range of everything that might be computed in float16."""
        nodes = [node for node in model.graph if self._unfit(node) is None] if self.type == "float16" else []
        return [
            StatisticRequest(value, HistogramObserver)
            for node in nodes
            if node.op_type not in _STEPS
            for value in _floats(node.outputs)
        ]

    def call(self, model: ir.Model) -> PassResult:
        """Convert what can be converted."""
        result = PassResult(model, modified=False)
        writer = _Writer(model.graph, self.type)
        for node in list(model.graph):
            result.refusals += _inside(node)
            if not _floats(node.inputs) and not _floats(node.outputs):
                writer.keep(node)
                continue
            reason = self._unfit(node) or (_misfit(node) if node.op_type in _STEPS else self._overflow(node))
            if reason is not None:
                result.refusals.append(Refusal.at(node, reason))
                writer.keep(node)
            elif admitted():
                result.sites.append(location_of(node))
                writer.convert(node)
            else:
                writer.keep(node)
        writer.finish()
        result.modified = bool(result.sites)
        return result

    def _unfit(self, node: ir.Node) -> str | None:
        """Why an operator stays in float, whatever it computes with."""
        if node.op_type in (*self.keep, *_ALWAYS):
            return f"{node.op_type} is kept in float"
        if any(True for _ in subgraphs_of(node)):
            return f"{node.op_type} holds subgraphs, which stay in float"
        if node.domain != "":
            return f"{node.op_type} is not an operator of the standard"
        if not _admits(node, _TYPES[self.type][0]):
            return f"{node.op_type} has no form in {self.type}"
        if node.op_type in _STEPS:
            return None if self.type == "float16" else f"the scale of {node.op_type} is kept in float"
        return None if _floats(node.outputs) else f"{node.op_type} has no result of type FLOAT"

    def _overflow(self, node: ir.Node) -> str | None:
        """Which operand or result would come too near to the largest number."""
        largest = _TYPES[self.type][2] / _MARGIN
        weights = [(value.name, value.const_value) for value in node.inputs if _is_weight(value)]
        reaches = {name: float(np.abs(t.numpy()).max(initial=0)) for name, t in weights if t is not None}
        for value in _floats(node.outputs) if self.type == "float16" else ():
            found = statistic_of(value, HistogramObserver)
            if found is None:
                return f"nothing was seen of {value.name!r}: its range needs calibration data"
            reaches[value.name] = max(-found.low, found.high)
        return next((f"{n!r} reaches {reach:.4g}" for n, reach in reaches.items() if not reach <= largest), None)


def _inside(node: ir.Node) -> list[Refusal]:
    """A refusal for each operator on floats in the subgraphs of a node."""
    inner = [inside for graph in subgraphs_of(node) for inside in graph.all_nodes()]
    floats = [inside for inside in inner if _floats(inside.inputs) or _floats(inside.outputs)]
    return [Refusal.at(inside, f"it stands in a subgraph of {node.op_type}") for inside in floats]


def _misfit(node: ir.Node) -> str | None:
    """Why the scale of integers, or what they stand for, cannot be told in float16."""
    scale, steps = node.inputs[1], node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if not _is_weight(scale) or scale.const_value is None or steps is None or steps.dtype is None:
        return f"the scale of {node.op_type} is not known before it runs"
    scales = np.abs(scale.const_value.numpy())
    if scales.min(initial=np.inf) < np.finfo(np.float16).smallest_normal:
        return f"{scale.name!r} falls to {scales.min():.4g}"
    reach = float(scales.max(initial=0)) * max(-float(steps.dtype.min), float(steps.dtype.max))
    return f"{scale.name!r} reaches {reach:.4g}" if reach > _TYPES["float16"][2] / _MARGIN else None


def _floats(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None and value.dtype is ir.DataType.FLOAT]


def _is_weight(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return bool(_floats([value])) and value is not None and value.const_value is not None and not value.is_graph_input()


def _admits(node: ir.Node, kind: ir.DataType) -> bool:
    """Whether the standard lets all float operands and results of a node be of another type."""
    version = node.version or (node.graph.opset_imports.get("", 23) if node.graph is not None else 23)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    wanted = f"tensor({kind.name.lower()})"
    for values, ports in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        allowed = [port.types for port in ports]
        kinds = (allowed[min(index, len(allowed) - 1)] for index, value in enumerate(values) if _floats([value]))
        if any(wanted not in kind for kind in kinds):
            return False
    return True


@dataclass
class _Writer:
    """Changes types node by node, in the order of the graph, and casts where two types meet."""

    graph: ir.Graph
    type: str
    casts: dict[tuple[int, ir.DataType], ir.Value] = field(default_factory=dict)
    constants: dict[int, ir.Value] = field(default_factory=dict)
    converted: set[ir.Value] = field(default_factory=set)
    """Values that were float."""

    @property
    def half(self) -> ir.DataType:
        """The type of 16 bits."""
        return _TYPES[self.type][0]

    def convert(self, node: ir.Node) -> None:
        """Let a node compute in 16 bits."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype is ir.DataType.FLOAT:
                node.replace_input_with(index, self._constant(value) or self._cast(node, value, self.half))
        for value in _floats(node.outputs):
            value.type = ir.TensorType(self.half)
            self.converted.add(value)

    def keep(self, node: ir.Node) -> None:
        """Let a node go on in float, and what its subgraphs read of values around them."""
        inner = [inside for graph in subgraphs_of(node) for inside in graph.all_nodes()]
        for reader in (node, *inner):
            for index, value in enumerate(reader.inputs if reader.op_type != "Cast" else ()):
                if value is not None and value.dtype is self.half and value in self.converted:
                    reader.replace_input_with(index, self._cast(node, value, ir.DataType.FLOAT))

    def finish(self) -> None:
        """Give outputs of the model their old type and name, and forget weights that nobody reads in float."""
        forget_unread(self.graph, [v for v in self.graph.initializers.values() if id(v) in self.constants])
        for index, value in enumerate(list(self.graph.outputs)):
            if value not in self.converted:
                continue
            name = value.name or ""
            value.name = f"{name}_{self.type}"
            real = self._make(value, ir.DataType.FLOAT, f"{name}_cast")
            real.name = name
            node = real.producer()
            if node is not None:
                self.graph.append(node)
            self.graph.outputs[index] = real

    def _constant(self, value: ir.Value) -> ir.Value | None:
        """A weight in 16 bits; None if the value is not one."""
        tensor = value.const_value
        if tensor is None or not _is_weight(value) or value.producer() is not None:
            return None
        if id(value) not in self.constants:
            kind, name = _TYPES[self.type][1], f"{value.name}_{self.type}"
            made = lazy(lambda: tensor.numpy().astype(kind), self.half, sizes_of(tensor), name)
            self.constants[id(value)] = add_initializer(self.graph, name, made)
        return self.constants[id(value)]

    def _cast(self, node: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
        if (id(value), kind) not in self.casts:
            made = self._make(value, kind, f"{value.name}_to_{kind.name.lower()}")
            cast = made.producer()
            if cast is not None:
                copy_location(node, cast)
                self.graph.insert_before(node, cast)
            self.casts[id(value), kind] = made
        return self.casts[id(value), kind]

    def _make(self, value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
        made = ir.node("Cast", [value], {"to": kind}, name=name).outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(kind)
        return made
