"""The profile that an ONNX Runtime session writes, and what each of its operators computes.

The runtime tells time and the shapes of inputs and outputs of every operator, after its own fusions. Weights that it
has packed are not among the inputs any more; a product's sizes follow from its first input and its output.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from planish.optimizer.interfaces.counters import OperatorTime

_RUN = "model_run"
_INTEGER = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention",
     "QLinearConv", "ConvInteger"}
)  # fmt: skip
"""Operators that multiply in 8 bits."""
_ACCURACY = {2: "f16", 4: "i8"}
"""Attribute accuracy_level of MatMulNBits -> the type in which it multiplies; all others: float32."""
_BLOCKS = 4
"""Bits of a weight in MatMulNBits that the runtime made itself and whose attributes the file does not have."""


@dataclass(frozen=True)
class _Event:
    """One run of one operator."""

    name: str
    kind: str
    begin: int
    microseconds: int
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    weight_bytes: int
    activation_bytes: int


def operator_times(profile: Path, file: Path) -> list[OperatorTime]:
    """Time and work of every operator of a session whose profile is written; its first call is not counted.

    ``file`` is the graph that the session read: attributes of operators that the runtime left as they are.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    runs = sorted(event["ts"] for event in events if event.get("name") == _RUN)[1:]
    if not runs:
        return []
    spent: dict[tuple[str, str], list[_Event]] = defaultdict(list)
    for event in _outermost(
        [_event(event) for event in events if event.get("cat") == "Node" and event["ts"] >= runs[0]]
    ):
        spent[event.name, event.kind].append(event)
    nodes = {node.name: node for node in ir.load(file).graph.all_nodes()}
    return [_operator(same, len(runs), nodes.get(name)) for (name, _), same in spent.items()]


def _event(event: Mapping[str, Any]) -> _Event:
    told = event["args"]
    return _Event(
        event["name"].removesuffix("_kernel_time"),
        told["op_name"],
        event["ts"],
        event["dur"],
        _shapes(told["input_type_shape"]),
        _shapes(told["output_type_shape"]),
        int(told["parameter_size"]),
        int(told["activation_size"]) + int(told["output_size"]),
    )


def _shapes(told: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for each in told for shape in each.values())


def _outermost(events: Sequence[_Event]) -> list[_Event]:
    """Events that are not inside another one: the time of an If or a Loop includes that of its body."""
    kept, end = [], -1
    for event in sorted(events, key=lambda each: (each.begin, -each.microseconds)):
        if event.begin >= end:
            kept.append(event)
            end = event.begin + event.microseconds
    return kept


def _operator(events: Sequence[_Event], calls: int, node: ir.Node | None) -> OperatorTime:
    first, per_call = events[0], len(events) // calls
    if per_call * calls == len(events):
        sums = [sum(e.microseconds for e in events[i : i + per_call]) for i in range(0, len(events), per_call)]
        microseconds = statistics.median(sums)
    else:  # a loop whose turns depend on values
        microseconds = sum(event.microseconds for event in events) / calls
    adds, weights = _PRODUCTS.get(first.kind, _no_product)(first)
    bits, arithmetic = 32, "i8" if first.kind in _INTEGER else "f32"
    if arithmetic == "i8":
        bits = 8
    if first.kind == "MatMulNBits":
        attributes = {} if node is None else node.attributes
        bits = attributes["bits"].as_int() if "bits" in attributes else _BLOCKS
        level = attributes["accuracy_level"].as_int() if "accuracy_level" in attributes else 0
        arithmetic = _ACCURACY.get(level, "f32")
    return OperatorTime(
        first.name,
        first.kind,
        "",
        microseconds / 1e3,
        arithmetic,
        adds * max(per_call, 1),
        weights * bits // 8,
        first.activation_bytes,
    )


def _no_product(_: _Event) -> tuple[int, int]:
    return 0, 0


def _matmul(event: _Event) -> tuple[int, int]:
    """Multiply-adds and the numbers of a constant matrix: (…, m, k) by (k, n)."""
    (rows, *others), output = event.inputs, event.outputs[0]
    depth = rows[-1] if rows else 1
    matrices = [shape for shape in others if len(shape) >= 2]
    constant = not matrices or event.weight_bytes > 0
    return math.prod(output) * depth, depth * output[-1] if constant and output else 0


def _attention(event: _Event) -> tuple[int, int]:
    """Queries by keys, and probabilities by values, over the keys of all tokens so far."""
    output, present = event.outputs[0], [shape for shape in event.outputs[1:] if len(shape) == 4]
    keys = event.inputs[1] if len(event.inputs) > 1 else event.inputs[0]
    return 2 * math.prod(output) * (present[0][2] if present else keys[-2]), 0


def _projected_attention(event: _Event) -> tuple[int, int]:
    """Attention of ONNX, or that of com.microsoft, which projects first: (batch, tokens, width) by three matrices."""
    if len(event.inputs) > 1 and len(event.inputs[1]) == len(event.inputs[0]):
        return _attention(event)
    (*rows, width), output = event.inputs[0], event.outputs[0]
    weights = width * 3 * output[-1]
    return math.prod(rows) * weights + 2 * math.prod(output) * rows[-1], weights


def _convolution(event: _Event) -> tuple[int, int]:
    if len(event.inputs) < 2 or len(event.inputs[1]) != len(event.inputs[0]):
        return 0, 0
    return math.prod(event.outputs[0]) * math.prod(event.inputs[1][1:]), math.prod(event.inputs[1])


_PRODUCTS: Mapping[str, Callable[[_Event], tuple[int, int]]] = {
    **dict.fromkeys(
        ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
         "QLinearMatMul", "QGemm", "MatMulNBits"),
        _matmul,
    ),
    **dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention"), _attention),
    **dict.fromkeys(("Attention", "QAttention"), _projected_attention),
    **dict.fromkeys(("Conv", "FusedConv", "QLinearConv", "ConvInteger"), _convolution),
}  # fmt: skip
"""Multiply-adds of an operator, and the numbers of its weights where the runtime has packed them."""
