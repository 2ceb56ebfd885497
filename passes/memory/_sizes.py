"""Sizes of all values of a graph, in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from planish.optimizer.ir.annotations import NAME_SCOPES as NAME_SCOPES
from planish.optimizer.ir.shape_inference import follows_few
from planish.optimizer.ir.weightless import without_weights


def sizes_of_values(model: ir.Model, axes: Mapping[str, int]) -> tuple[dict[int, int], int]:
    """Bytes of each value computed in the main graph, by id, for these sizes of axes (1 by default).

    Recorded shapes are used if all their axes are named; for others, the standard's shape inference runs on a copy
    without weights and with static inputs. Returns also the number of unknown values, which count 0.
    """
    inferred = _infer_at(model, axes)
    sizes: dict[int, int] = {}
    unknown = 0
    for node, twin in zip(model.graph, inferred.graph, strict=True):
        for value, other in zip(node.outputs, twin.outputs, strict=True):
            shapes = (_at(value.shape, axes), _at(other.shape, {}))
            shape = next((shape for shape in shapes if shape is not None), None)
            dtype = value.dtype or other.dtype
            unknown += shape is None or dtype is None
            sizes[id(value)] = 0 if shape is None or dtype is None else math.prod(shape) * dtype.bitwidth // 8
    return sizes, unknown


def _infer_at(model: ir.Model, axes: Mapping[str, int]) -> ir.Model:
    copy = without_weights(model)
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else axes.get(dim.value or "", 1) for dim in value.shape]
            )
    for node in copy.graph.all_nodes():
        for value in node.outputs:
            # Recorded shapes name the axes; inference must derive numbers from the inputs instead.
            value.shape = None
    inferred: ir.Model = ir.from_proto(
        onnx.shape_inference.infer_shapes(ir.to_proto(copy), data_prop=follows_few(copy))
    )
    return inferred


def _at(shape: ir.Shape | None, axes: Mapping[str, int]) -> list[int] | None:
    """The shape in numbers for these sizes of axes, or None if a dimension is neither a number nor such an axis."""
    if shape is None:
        return None
    dims = [dim if isinstance(dim, int) else axes.get(dim.value or "") for dim in shape]
    sizes_found = [dim for dim in dims if dim is not None]
    return sizes_found if len(sizes_found) == len(dims) else None
