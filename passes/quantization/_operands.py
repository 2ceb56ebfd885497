"""Constant operands of a node, changed for that node alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import matrix_behind
from planish.optimizer.ir.edit import add_initializer, forget_unread
from planish.optimizer.ir.graph import constant_of, sizes_of
from planish.optimizer.ir.lazy_tensors import lazy


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of a constant, the float form of a 16-bit matrix; ValueError if the value is not constant."""
    if value is not None and value.const_value is not None:
        return value.const_value
    matrix = matrix_behind(value)
    if matrix is not None:
        return matrix
    array = constant_of(value)
    if array is None:
        raise ValueError(f"{'nothing' if value is None else value.name!r} is not constant")
    return ir.tensor(array)


def change_operand(
    graph: ir.Graph, node: ir.Node, index: int, suffix: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Replace a constant operand of a node by a changed float copy of the same shape, computed when it is read.

    Other readers keep the constant; it is removed if there are none.
    """
    value = node.inputs[index]
    tensor = tensor_of(value)
    name = f"{'' if value is None else value.name}_{suffix}"
    # Lazy: passes in a row would otherwise keep every form of every matrix in memory.
    read = lambda: np.asarray(change(tensor.numpy().astype(np.float32)), np.float32)  # noqa: E731
    node.replace_input_with(index, add_initializer(graph, name, lazy(read, ir.DataType.FLOAT, sizes_of(tensor), name)))
    if value is not None:
        forget_unread(graph, [value])
