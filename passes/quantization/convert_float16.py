"""Compute in 16 bits, except operators that would overflow or lose too much accuracy.

Before:  y = MatMul (x, w);  z = Softmax (y);  r = MatMul (z, v)
After:   h = Cast <to=10> (x);  y = MatMul (h, w16);  f = Cast <to=1> (y);  z = Softmax (f)
         g = Cast <to=10> (z);  o = MatMul (g, v16);  r = Cast <to=1> (o)

1. An operator stays in float if the option `keep` names it, if it has a subgraph or no 16-bit form in the standard.
2. It stays in float if a weight, or an activation over calibration data, comes near the largest number of the type.
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
"""Factor between the largest number of the type and the largest magnitude over calibration data: other inputs may give
larger ones."""
_ALWAYS = ("Cast", "CastLike", "Constant", "ConstantOfShape", "DynamicQuantizeLinear")
"""Operators whose attributes or definition fix the type of the result."""
_SCALED = ("QuantizeLinear", "DequantizeLinear")
"""Operators with scales: a runtime fuses them with a MatMul only if no Cast stands between."""


@dataclass(frozen=True)
class ConvertFloat16(Pass):
    """Give operators of the main graph 16-bit operands and results, one by one."""

    name: ClassVar[str] = "convert-float16"
    exact: ClassVar[bool] = False

    type: Literal["float16", "bfloat16"] = "float16"
    """float16 has 10 bits for the fraction; bfloat16 has 7, and the range of float."""

    keep: tuple[str, ...] = (
        "LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceSumSquare",
        "ReduceL2", "Pow", "Exp", "Log", "Range", "CumSum",
    )  # fmt: skip
    """Operators that stay in float: sums of many terms, and functions that grow fast."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """The range of each result that might be computed in float16."""
        nodes = [node for node in model.graph if self._unsupported(node) is None] if self.type == "float16" else []
        return [
            StatisticRequest(value, HistogramObserver)
            for node in nodes
            if node.op_type not in _SCALED
            for value in _floats(node.outputs)
        ]

    def call(self, model: ir.Model) -> PassResult:
        """Convert the operators of the main graph that can be converted."""
        result = PassResult(model, modified=False)
        writer = _Writer(model.graph, self.type)
        for node in list(model.graph):
            result.refusals += _refusals_in_subgraphs(node)
            if not _floats(node.inputs) and not _floats(node.outputs):
                writer.keep(node)
                continue
            overflow = _scale_overflow if node.op_type in _SCALED else self._overflow
            reason = self._unsupported(node) or overflow(node)
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

    def _unsupported(self, node: ir.Node) -> str | None:
        """Reason why an operator stays in float, whatever its operands are; None if it need not."""
        if node.op_type in (*self.keep, *_ALWAYS):
            return f"{node.op_type} is kept in float"
        if any(True for _ in subgraphs_of(node)):
            return f"{node.op_type} holds subgraphs, which stay in float"
        if node.domain != "":
            return f"{node.op_type} is not an operator of the standard"
        if not _schema_allows(node, _TYPES[self.type][0]):
            return f"{node.op_type} has no form in {self.type}"
        if node.op_type in _SCALED:
            return None if self.type == "float16" else f"the scale of {node.op_type} is kept in float"
        return None if _floats(node.outputs) else f"{node.op_type} has no result of type FLOAT"

    def _overflow(self, node: ir.Node) -> str | None:
        """Reason why a weight or result is too near the largest number of the type; None if none is."""
        limit = _TYPES[self.type][2] / _MARGIN
        weights = [(value.name, value.const_value) for value in node.inputs if _is_weight(value)]
        magnitudes = {name: float(np.abs(t.numpy()).max(initial=0)) for name, t in weights if t is not None}
        for value in _floats(node.outputs) if self.type == "float16" else ():
            histogram = statistic_of(value, HistogramObserver)
            if histogram is None:
                return f"nothing was seen of {value.name!r}: its range needs calibration data"
            magnitudes[value.name] = max(-histogram.low, histogram.high)
        # Not `magnitude > limit`: NaN must be refused too.
        return next((f"{n!r} reaches {size:.4g}" for n, size in magnitudes.items() if not size <= limit), None)


def _refusals_in_subgraphs(node: ir.Node) -> list[Refusal]:
    """Refusals of the operators on floats in the subgraphs of a node."""
    inner = [inside for graph in subgraphs_of(node) for inside in graph.all_nodes()]
    floats = [inside for inside in inner if _floats(inside.inputs) or _floats(inside.outputs)]
    return [Refusal.at(inside, f"it stands in a subgraph of {node.op_type}") for inside in floats]


def _scale_overflow(node: ir.Node) -> str | None:
    """Reason why float16 cannot hold the scale of integers, or the values they stand for; None if it can."""
    scale, integers = node.inputs[1], node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if not _is_weight(scale) or scale.const_value is None or integers is None or integers.dtype is None:
        return f"the scale of {node.op_type} is not known before it runs"
    scales = np.abs(scale.const_value.numpy())
    # Below the smallest normal number a scale loses digits, and soon becomes zero.
    if scales.min(initial=np.inf) < np.finfo(np.float16).smallest_normal:
        return f"{scale.name!r} falls to {scales.min():.4g}"
    largest = float(scales.max(initial=0)) * max(-float(integers.dtype.min), float(integers.dtype.max))
    return f"{scale.name!r} reaches {largest:.4g}" if largest > _TYPES["float16"][2] / _MARGIN else None


def _floats(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None and value.dtype is ir.DataType.FLOAT]


def _is_weight(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return bool(_floats([value])) and value is not None and value.const_value is not None and not value.is_graph_input()


def _schema_allows(node: ir.Node, dtype: ir.DataType) -> bool:
    """True if the standard allows ``dtype`` for all float operands and results of a node."""
    version = node.version or (node.graph.opset_imports.get("", 23) if node.graph is not None else 23)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    type_name = f"tensor({dtype.name.lower()})"
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        allowed = [parameter.types for parameter in parameters]
        # The last parameter of a schema may be variadic: it stands for all values from its place on.
        types = (allowed[min(index, len(allowed) - 1)] for index, value in enumerate(values) if _floats([value]))
        if any(type_name not in names for names in types):
            return False
    return True


@dataclass
class _Writer:
    """Writer that changes types node by node, in the order of the graph, and casts where two types meet."""

    graph: ir.Graph
    type: str
    casts: dict[tuple[int, ir.DataType], ir.Value] = field(default_factory=dict)
    constants: dict[int, ir.Value] = field(default_factory=dict)
    converted: set[ir.Value] = field(default_factory=set)
    """Values whose type was changed: others may have been in 16 bits before."""

    @property
    def half(self) -> ir.DataType:
        """The 16-bit type."""
        return _TYPES[self.type][0]

    def convert(self, node: ir.Node) -> None:
        """Change the operands and results of a node to 16 bits."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype is ir.DataType.FLOAT:
                node.replace_input_with(index, self._constant(value) or self._cast(node, value, self.half))
        for value in _floats(node.outputs):
            value.type = ir.TensorType(self.half)
            self.converted.add(value)

    def keep(self, node: ir.Node) -> None:
        """Cast converted operands of a node, and of the nodes in its subgraphs, back to float."""
        inner = [inside for graph in subgraphs_of(node) for inside in graph.all_nodes()]
        for reader in (node, *inner):
            for index, value in enumerate(reader.inputs if reader.op_type != "Cast" else ()):
                if value is not None and value.dtype is self.half and value in self.converted:
                    reader.replace_input_with(index, self._cast(node, value, ir.DataType.FLOAT))

    def finish(self) -> None:
        """Cast outputs of the model back to float under their names, and remove weights that are not read in float."""
        forget_unread(self.graph, [v for v in self.graph.initializers.values() if id(v) in self.constants])
        for index, value in enumerate(list(self.graph.outputs)):
            if value not in self.converted:
                continue
            name = value.name or ""
            value.name = f"{name}_{self.type}"
            output = self._new_cast(value, ir.DataType.FLOAT, f"{name}_cast")
            output.name = name
            node = output.producer()
            if node is not None:
                self.graph.append(node)
            self.graph.outputs[index] = output

    def _constant(self, value: ir.Value) -> ir.Value | None:
        """A weight in 16 bits; None if the value is no weight."""
        tensor = value.const_value
        if tensor is None or not _is_weight(value) or value.producer() is not None:
            return None
        if id(value) not in self.constants:
            numpy_type, name = _TYPES[self.type][1], f"{value.name}_{self.type}"
            half = lazy(lambda: tensor.numpy().astype(numpy_type), self.half, sizes_of(tensor), name)
            self.constants[id(value)] = add_initializer(self.graph, name, half)
        return self.constants[id(value)]

    def _cast(self, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in another type, cast in front of the first node that reads it so."""
        if (id(value), dtype) not in self.casts:
            result = self._new_cast(value, dtype, f"{value.name}_to_{dtype.name.lower()}")
            cast = result.producer()
            if cast is not None:
                copy_location(before, cast)
                self.graph.insert_before(before, cast)
            self.casts[id(value), dtype] = result
        return self.casts[id(value), dtype]

    def _new_cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        result = ir.node("Cast", [value], {"to": dtype}, name=name).outputs[0]
        result.name, result.shape, result.type = name, value.shape, ir.TensorType(dtype)
        return result
