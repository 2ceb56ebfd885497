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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from planish.optimizer.interfaces.counters import OperatorTime

_RUN = "model_run"
_BODIES = frozenset({"If", "Loop", "Scan"})
"""Operators whose time includes that of the operators inside."""
_INTEGER = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention",
     "QLinearConv", "ConvInteger"}
)  # fmt: skip
"""Operators that multiply in 8 bits."""
_BITS = {"i8": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_FLOATS = {"float16": "f16", "bfloat16": "bf16", "double": "f64"}
_ACCURACY = {2: "f16", 3: "bf16", 4: "i8"}
"""Attribute accuracy_level of MatMulNBits -> the type in which it multiplies; all others: float32."""
_MADE_BY_RUNTIME = {"bits": 4, "block_size": 32, "accuracy_level": 4}
"""Attributes of a MatMulNBits that the runtime fused itself: a file does not have it (session options,
`qdq_matmulnbits_accuracy_level`)."""
_LEFT_BY_FILE = {"bits": 4, "block_size": 32, "accuracy_level": 0}
"""Those that a file may leave out."""


@dataclass(frozen=True)
class _Event:
    """One run of one operator."""

    name: str
    kind: str
    begin: int
    microseconds: int
    type: str
    """Element type of the first input."""
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    parameter_bytes: int
    """Constants that are not packed."""
    activation_bytes: int
    inside: list[_Event] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """The work of one run."""

    arithmetic: str = "f32"
    adds: int = 0
    weight_bytes: int = 0


def operator_times(profile: Path, file: Path) -> list[OperatorTime]:
    """Time and work of every operator of a session whose profile is written; its first call is not counted.

    ``file`` is the graph that the session read: attributes of operators that the runtime left as they are.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    runs = sorted(event["ts"] for event in events if event.get("name") == _RUN)[1:]
    if not runs:
        return []
    counted = [_event(event) for event in events if event.get("cat") == "Node" and event["ts"] >= runs[0]]
    spent: dict[tuple[str, str], list[_Event]] = defaultdict(list)
    for event in _outermost(counted):
        spent[event.name, event.kind].append(event)
    nodes = {node.name: node for node in ir.load(file).graph.all_nodes() if node.name}
    return [_operator(same, len(runs), nodes) for same in spent.values()]


def _event(event: Mapping[str, Any]) -> _Event:
    told = event["args"]
    types = [kind for each in told["input_type_shape"] for kind in each]
    return _Event(
        event["name"].removesuffix("_kernel_time"),
        told["op_name"],
        event["ts"],
        event["dur"],
        types[0] if types else "",
        _shapes(told["input_type_shape"]),
        _shapes(told["output_type_shape"]),
        int(told["parameter_size"]),
        int(told["activation_size"]) + int(told["output_size"]),
    )


def _shapes(told: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for each in told for shape in each.values())


def _outermost(events: Sequence[_Event]) -> list[_Event]:
    """Events that are not inside an If, a Loop or a Scan, which get them."""
    kept: list[_Event] = []
    body: _Event | None = None
    for event in sorted(events, key=lambda each: (each.begin, -each.microseconds)):
        # Times are cut to microseconds: the last operator of a body may begin at the end of it.
        if body is not None and event.begin <= body.begin + body.microseconds:
            body.inside.append(event)
            continue
        kept.append(event)
        body = event if event.kind in _BODIES else None
    return kept


def _operator(events: Sequence[_Event], calls: int, nodes: Mapping[str, ir.Node]) -> OperatorTime:
    """All runs of operators of one name and kind together; there may be several in a call."""
    first, several = events[0], max(round(len(events) / calls), 1)
    if several * calls == len(events):
        sums = [sum(e.microseconds for e in events[i : i + several]) for i in range(0, len(events), several)]
        microseconds = float(statistics.median(sums))
    else:  # inside a loop whose turns depend on values
        microseconds = sum(event.microseconds for event in events) / calls
    works = [_work(each, nodes) for event in events[:several] for each in (event, *event.inside)]
    products = [work for work in works if work.adds]
    uncounted = any(map(_is_uncounted, (first, *first.inside)))
    return OperatorTime(
        first.name,
        f"{first.kind} (products not counted)" if uncounted else first.kind,
        "",
        microseconds / 1e3,
        products[0].arithmetic if products else "f32",
        sum(work.adds for work in works),
        sum(work.weight_bytes for work in works),
        sum(event.activation_bytes for event in events[:several]),
    )


def _is_uncounted(event: _Event) -> bool:
    """True for an operator that multiplies, and whose sizes the profile does not tell: packed weights of a Conv."""
    if event.kind in _UNCOUNTED:
        return True
    works = event.kind in _PRODUCTS and bool(event.outputs) and math.prod(event.outputs[0]) > 0
    return works and not _PRODUCTS[event.kind](event)[0]


def _work(event: _Event, nodes: Mapping[str, ir.Node]) -> _Work:
    """The work of one run of an operator, by its sizes."""
    if event.kind not in _PRODUCTS or not event.outputs:
        return _Work()
    adds, weights = _PRODUCTS[event.kind](event)
    if event.kind == "MatMulNBits":
        node = nodes.get(event.name)
        given = _MADE_BY_RUNTIME if node is None else _LEFT_BY_FILE
        bits, block, level = (
            value if node is None else node.attributes.get_int(name, value) for name, value in given.items()
        )
        return _Work(_ACCURACY.get(level, "f32"), adds, weights * bits // 8 + 4 * weights // block)
    arithmetic = "i8" if event.kind in _INTEGER else _FLOATS.get(event.type, "f32")
    return _Work(arithmetic, adds, weights * _BITS[arithmetic] // 8)


def _matmul(event: _Event) -> tuple[int, int]:
    """Multiply-adds and the numbers of a constant matrix: (…, m, k), or its transpose, by (k, n)."""
    (rows, *others), output = event.inputs, event.outputs[0]
    if not rows or not output:
        return 0, 0
    turned = len(rows) >= 2 and len(output) >= 2 and rows[-2] != output[-2] == rows[-1]
    depth = rows[-2] if turned else rows[-1]
    weights = depth * output[-1]
    # What is packed is not among the inputs; constants that are may also be scales alone.
    constant = not any(len(shape) >= 2 for shape in others) or event.parameter_bytes >= weights
    return math.prod(output) * depth, weights if constant else 0


def _attention(event: _Event) -> tuple[int, int]:
    """Queries by keys, and probabilities by values, over the keys of all tokens so far."""
    output, present = event.outputs[0], [shape for shape in event.outputs[1:] if len(shape) == 4]
    keys = next((shape for shape in event.inputs[1:] if len(shape) == len(event.inputs[0])), event.inputs[0])
    return 2 * math.prod(output) * (present[0][2] if present else keys[-2]), 0


def _projected_attention(event: _Event) -> tuple[int, int]:
    """Attention of ONNX, or that of com.microsoft, which projects first: (batch, tokens, width) by three matrices."""
    if len(event.inputs) > 1 and len(event.inputs[1]) == len(event.inputs[0]):
        return _attention(event)
    (*rows, width), output = event.inputs[0], event.outputs[0]
    weights = width * 3 * output[-1]
    return math.prod(rows) * weights + 2 * math.prod(output) * rows[-1], weights


def _convolution(event: _Event) -> tuple[int, int]:
    """Multiply-adds of a convolution whose weights are not packed, and the numbers of these."""
    weights = next((shape for shape in event.inputs[1:] if len(shape) == len(event.inputs[0])), None)
    return (0, 0) if weights is None else (math.prod(event.outputs[0]) * math.prod(weights[1:]), math.prod(weights))


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
"""Multiply-adds of an operator, and the numbers of its constant weights."""
_UNCOUNTED = frozenset({"Einsum", "ConvTranspose", "LSTM", "GRU", "RNN", "MoE", "QMoE"})
"""Operators that multiply as well, and are not counted."""
