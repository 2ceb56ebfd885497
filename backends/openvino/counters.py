"""Performance counters of a compiled OpenVINO model, and what each of its operators computes.

The runtime tells time and kernel of every operator that it runs, and the names of the operators of the file that it
made it from; sizes it does not tell. They come from the file, reshaped to the sizes of the inputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planish.backends.openvino.engine import BEAMS, OpenVinoEngine, input_of_variable
from planish.optimizer.interfaces.counters import OperatorTime
from planish.optimizer.ir.program import Arrays
from planish.optimizer.system.machine import instruction_set

_BITS = {"f32": 32, "bf16": 16, "f16": 16, "i8": 8}
_ARITHMETICS = ("bf16", "f16", "i8", "u8", "f32")
"""Endings of names of kernels."""
_MULTIPLYING = (
    "FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention", "Subgraph", "GatherMatmul", "LLMMLP",
    "QKVProjection",
)  # fmt: skip
"""Beginnings of the runtime's own operators that may hold a product."""
_INDICES = ("i32", "i64")
"""Types of constants that shapes are computed from."""
_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_NOT_COUNTED = "products without a counter"
_STORED_INTEGERS = "FullyConnectedCompressed"
_FIRST_CALLS = 3
_READERS = 6
"""Readers in a row that are searched for the name of a fused product."""


def operator_times(ov: Any, engine: OpenVinoEngine, model: Any, inputs: Arrays, calls: int) -> list[OperatorTime]:
    """Time and work of every operator that ran, means of ``calls`` runs.

    ``engine`` was compiled with the property PERF_COUNT; ``model`` is its file, and gets the sizes of the inputs.
    """
    # A counter tells the mean of all calls so far, and the first ones prepare kernels and read weights from the file.
    for _ in range(_FIRST_CALLS):
        request, _ = engine.counted(inputs)
    first = _milliseconds(ov, request)
    for _ in range(calls):
        request, feeds = engine.counted(inputs)
    means = _of_last_calls(first, _milliseconds(ov, request), calls)
    compiled = request.get_compiled_model()
    works = _works_of(ov, model, feeds)
    graph = {node.get_friendly_name(): _Ran(node) for node in compiled.get_runtime_model().get_ops()}
    products = _products_by_runtime_name(model, works, graph)
    # The group in which activations are rounded, where the runtime does so (decision 53).
    group = int(compiled.get_property(_GROUP)) if "vnni" in instruction_set() else 0
    kinds = {each.node_name: (each.node_type, each.exec_type) for each in _executed(ov, request)}
    times = [_operator(name, *kinds[name], mean, products.get(name, ()), group) for name, mean in means.items()]
    # What no counter goes by the name of, or whose sizes are not known, is not kept from the sum.
    counted = {id(work) for name in products.keys() & kinds.keys() for work in products[name]}
    rest = [work for work in works.values() if work.multiplies and id(work) not in counted]
    return [*times, *([_operator(_NOT_COUNTED, _NOT_COUNTED, "", 0.0, rest, 0)] if rest else [])]


def _executed(ov: Any, request: Any) -> list[Any]:
    return [each for each in request.get_profiling_info() if each.status == ov.ProfilingInfo.Status.EXECUTED]


def _milliseconds(ov: Any, request: Any) -> dict[str, float]:
    """Mean time of every operator, over all calls of the model so far."""
    sums: dict[str, float] = defaultdict(float)
    for each in _executed(ov, request):
        sums[each.node_name] += each.real_time.total_seconds() * 1e3
    return sums


def _of_last_calls(first: Mapping[str, float], all_calls: Mapping[str, float], calls: int) -> dict[str, float]:
    """Means of the last ``calls``, by those of the first ``_FIRST_CALLS`` and those of all."""
    sums = {
        name: mean * (_FIRST_CALLS + calls) - first.get(name, 0.0) * _FIRST_CALLS for name, mean in all_calls.items()
    }
    return {name: max(0.0, spent / calls) for name, spent in sums.items()}


def _products_by_runtime_name(
    model: Any, works: Mapping[str, _Work], graph: Mapping[str, _Ran]
) -> Mapping[str, list[_Work]]:
    """Runtime operator -> the products of the file that it computes.

    A product that is fused with what follows may go by the name of the latter, so its readers are searched too.
    """
    names = {original: name for name, ran in graph.items() for original in ran.originals if ran.may_multiply}
    products: dict[str, list[_Work]] = defaultdict(list)
    for node in model.get_ops():
        work, reader = works[node.get_friendly_name()], node
        for _ in range(_READERS if work.adds else 0):
            name = names.get(reader.get_friendly_name())
            if name is not None:
                products[name].append(work)
                break
            readers = reader.output(0).get_target_inputs()
            reader = next(iter(readers)).get_node()
            if len(readers) != 1 or works[reader.get_friendly_name()].multiplies:
                break
    return products


def _operator(
    name: str, kind: str, kernel: str, milliseconds: float, products: Sequence[_Work], group: int
) -> OperatorTime:
    arithmetic = next((t for t in _ARITHMETICS if kernel.lower().endswith(t)), "f32").replace("u8", "i8")
    activation_bytes = sum(work.activation_bytes(arithmetic) for work in products)
    if kind == _STORED_INTEGERS and 0 < group <= min((work.block for work in products), default=0):
        arithmetic = "i8"  # the kernel goes by the type of its activations, and rounds them
    adds, weight_bytes = sum(work.adds for work in products), sum(work.weight_bytes(arithmetic) for work in products)
    return OperatorTime(name, kind, kernel, milliseconds, arithmetic, adds, weight_bytes, activation_bytes)


class _Ran:
    """An operator of the runtime's own graph."""

    def __init__(self, node: Any) -> None:
        told = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if hasattr(value, "astype")}
        self.originals = tuple(filter(None, told.get("originalLayersNames", "").split(",")))
        self.may_multiply = told.get("layerType", "").startswith(_MULTIPLYING)


class _Work:
    """The work of an operator of the file at known sizes."""

    def __init__(self, node: Any, weights: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """``weights`` are bytes and number of elements of the constants behind each input."""
        self.multiplies = node.get_type_name() in _PRODUCTS
        self.adds = _PRODUCTS[node.get_type_name()](node) if self.multiplies else 0
        self._constants = [each for constants in weights.values() for each in constants]
        ports = [node.get_input_partial_shape(port) for port in range(node.get_input_size()) if port not in weights]
        self._elements = sum(map(_elements, [*ports, node.get_output_partial_shape(0)])) if self.adds else 0

    @property
    def block(self) -> int:
        """Weights that share a scale: the largest constant over the next one."""
        counts = sorted((count for _, count in self._constants), reverse=True)
        return counts[0] // counts[1] if len(counts) > 1 else 0

    def weight_bytes(self, arithmetic: str) -> int:
        """Bytes of its weights in a kernel of this type: none keeps floats in more bits than it multiplies."""
        stored = sum(size for size, _ in self._constants)
        packed = any(size <= count for size, count in self._constants)  # integers, and floats that scale them
        return stored if packed else min(stored, sum(count for _, count in self._constants) * _BITS[arithmetic] // 8)

    def activation_bytes(self, arithmetic: str) -> int:
        """Bytes of what it reads and writes besides."""
        return self._elements * _BITS[arithmetic] // 8


def _elements(shape: Any) -> int:
    return math.prod(dim.get_length() for dim in shape) if shape.is_static else 0


def _works_of(ov: Any, model: Any, inputs: Arrays) -> Mapping[str, _Work]:
    """Name -> work of each operator, at the sizes of the inputs.

    Sizes that a file computes are known once they are folded. Weights become inputs before that, or folding would
    decode them; so do caches in variables, which a reshape does not reach.
    """
    from openvino import opset13 as ops
    from openvino.passes import ConstantFolding, Manager

    parameters = []
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = inputs[input_of_variable(node.get_variable_id())].shape
            parameters.append(ops.parameter(ov.PartialShape(list(shape)), node.get_output_element_type(0)))
            node.output(0).replace(parameters[-1].output(0))
    weights: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(dict)
    for node in model.get_ops():
        for port in range(node.get_input_size() if node.get_type_name() in _PRODUCTS else 0):
            constants = _constants(node, port)
            if constants:
                weights[node.get_friendly_name()][port] = [
                    (constant.get_byte_size(), math.prod(constant.get_output_shape(0)))
                    for constant in {each.get_friendly_name(): each for each in constants}.values()
                    if constant.get_output_element_type(0).get_type_name() not in _INDICES
                ]
                source = node.input_value(port)
                parameters.append(ops.parameter(source.get_partial_shape(), source.get_element_type()))
                node.input(port).replace_source_output(parameters[-1].output(0))
    for sink in model.get_sinks():
        model.remove_sink(sink)
    known = {**{name: array.shape for name, array in inputs.items()}, BEAMS: (len(next(iter(inputs.values()))),)}
    # A tensor that an Identity gives another name has both.
    names = {port: next(name for name in port.get_names() if name in known) for port in model.inputs}
    sizes = {port: list(known[name]) for port, name in names.items()}
    model.add_parameters(parameters)
    model.reshape(sizes)
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    return {node.get_friendly_name(): _Work(node, weights[node.get_friendly_name()]) for node in model.get_ops()}


def _constants(node: Any, port: int, depth: int = 8) -> Sequence[Any]:
    """The constants that an input is computed from, in a few steps of decoding, if it is computed from them alone."""
    source = node.input_value(port).get_node()
    if source.get_type_name() == "Constant":
        return [source]
    constants: list[Any] = []
    for each in range(source.get_input_size() if depth else 0):
        part = _constants(source, each, depth - 1)
        if not part:
            return []
        constants += part
    return constants


def _matmul(node: Any) -> int:
    shape, reads = node.get_input_partial_shape(0), node.get_attributes()
    axis = -2 if reads.get("transpose_a") and len(shape) > 1 else -1
    depth = shape[len(shape) + axis]
    return _elements(node.get_output_partial_shape(0)) * (depth.get_length() if depth.is_static else 0)


def _convolution(node: Any, channels: int = 1) -> int:
    shape = node.get_input_partial_shape(1)
    kernel = math.prod(dim.get_length() for dim in list(shape)[channels:]) if shape.is_static else 0
    return _elements(node.get_output_partial_shape(0)) * kernel


def _attention(node: Any) -> int:
    keys = node.get_input_partial_shape(1)
    length = keys[len(keys) - 2]
    both = _elements(node.get_input_partial_shape(0)) + _elements(node.get_output_partial_shape(0))
    return both * (length.get_length() if length.is_static else 0)


_PRODUCTS: Mapping[str, Callable[[Any], int]] = {
    "MatMul": _matmul,
    "Convolution": _convolution,
    "GroupConvolution": lambda node: _convolution(node, 2),  # weights: (groups, outputs, inputs, …)
    "ScaledDotProductAttention": _attention,
}
"""Multiply-adds of an operator."""
