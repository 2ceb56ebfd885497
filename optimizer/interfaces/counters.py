"""Time and work of the operators of an engine, and products that show what the kernels of a runtime reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class OperatorTime:
    """One operator as the runtime ran it: after its own fusions, under its own name."""

    name: str
    kind: str
    """The operator as the runtime calls it: `FullyConnected`, `MatMulNBits`."""
    kernel: str
    """The implementation, where the runtime tells it: `brgemm_avx512_bf16`."""
    milliseconds: float
    """Median of several calls."""
    arithmetic: str
    """The type in which it multiplies: `f32`, `bf16`, `f16`, `i8`."""
    multiply_adds: int = 0
    """Multiply-adds of one call; 0 for an operator that is no product."""
    weight_bytes: int = 0
    """Constants that it reads, in the type in which the kernel keeps them."""
    activation_bytes: int = 0
    """Everything that it reads and writes besides."""


@dataclass(frozen=True)
class Probe:
    """A way to multiply in one type: the fastest large product shows what the machine can do."""

    arithmetic: str
    target: str
    """The target that opens it, as text."""
    operator: str = "MatMul"


def product(rows: int, width: int, probe: Probe) -> ir.Model:
    """A graph of one product: x, (rows, width) in float32, by a constant (width, width).

    For "i8" x is rounded to 8 bits before it, and the operator is `MatMulInteger` or a `MatMul` of what they stand for.
    """
    integers = probe.arithmetic == "i8"
    weight = np.random.default_rng(0).integers(-127, 128, (width, width)).astype(np.int8 if integers else np.float32)
    x, w = ir.val("x", ir.DataType.FLOAT, (rows, width)), _constant("w", weight)
    scale, zero = _constant("scale", np.float32(0.01)), _constant("zero", np.uint8(128))
    nodes, operands, initializers = [], [x, w], [w]
    if integers:
        nodes = [ir.node("QuantizeLinear", [x, scale, zero])]
        operands, initializers = [nodes[0].outputs[0], w, zero], [w, scale, zero]
    if integers and probe.operator == "MatMul":
        nodes += [ir.node("DequantizeLinear", [operands[0], scale, zero]), ir.node("DequantizeLinear", [w, scale])]
        operands = [node.outputs[0] for node in nodes[1:]]
    y = ir.val("y", ir.DataType.INT32 if probe.operator == "MatMulInteger" else ir.DataType.FLOAT, (rows, width))
    nodes.append(ir.node(probe.operator, operands, outputs=[y]))
    graph = ir.Graph([x], [y], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="product")
    return ir.Model(graph, ir_version=10)


def _constant(name: str, value: np.ndarray | np.generic) -> ir.Value:
    array = np.asarray(value)
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
