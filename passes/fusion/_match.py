"""Matching helpers of fusions, which consist of pattern, check and rewrite.

*Pattern* matches the structure around one node. *Check* verifies types, constants and other readers, and gives the
reason for a refusal. *Rewrite* builds the replacement. A place whose pattern matches is a site: it either fires or is
refused with a reason. If only the core of the computation matches, the pattern reports a near miss: the sign of an
unknown form of some exporter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from planish.optimizer.interfaces.rewrite_pass import Refused
from planish.optimizer.ir.graph import constant_of, producer_of, rank_of, scalar_of, sole_user


def used_by(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only reader of ``value`` if it is one of these standard operators."""
    node = sole_user(value)
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def is_plain_constant(value: ir.Value | None) -> bool:
    """True if a value is equal in every run; an input with a default value is not."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary node that is not ``value`` (``value`` itself if both are)."""
    left, right = node.inputs[0], node.inputs[1]
    return right if left is value else left if right is value else None


def with_constant(node: ir.Node | None) -> Iterator[tuple[ir.Value, float]]:
    """Each way to read a binary node as (operand, number)."""
    inputs = () if node is None else node.inputs
    if len(inputs) == 2:
        for value, constant in ((inputs[0], inputs[1]), (inputs[1], inputs[0])):
            number = scalar_of(constant)
            if value is not None and number is not None:
                yield value, number


def squared(square: ir.Value | None) -> Iterator[ir.Value]:
    """d of d², in any of its forms."""
    power = producer_of(square, "Pow")
    if power is not None and power.inputs[0] is not None and scalar_of(power.inputs[1]) == 2.0:
        yield power.inputs[0]
    product = producer_of(square, "Mul")
    if product is not None and product.inputs[0] is not None and product.inputs[0] is product.inputs[1]:
        yield product.inputs[0]


def quotient_by(root: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Numerator and quotient of a division by ``root``, also as a multiplication with its reciprocal."""
    division = used_by(root, "Div")
    if division is None:
        return _product_with_reciprocal(root)
    numerator, one = division.inputs[0], scalar_of(division.inputs[0])
    if division.inputs[1] is not root or numerator is None:
        return None
    return _times(division.outputs[0]) if one == 1.0 else (numerator, division.outputs[0])


def _product_with_reciprocal(root: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    reciprocal = used_by(root, "Reciprocal")
    return None if reciprocal is None else _times(reciprocal.outputs[0])


def _times(factor: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The other factor and the product."""
    product = used_by(factor, "Mul")
    numerator = None if product is None else other_operand(product, factor)
    return None if product is None or numerator is None else (numerator, product.outputs[0])


def check_mean(mean: ir.Node, x: ir.Value) -> None:
    """Raise Refused unless a mean is over the last axis of ``x`` and keeps it."""
    axes, keeps = axes_of(mean), mean.attributes.get("keepdims")
    if axes not in ([-1], [(rank_of(x) or 0) - 1]):
        raise Refused(f"its mean is over axes {axes}, not the last one", mean)
    if keeps is not None and not keeps.as_int():
        raise Refused("its mean drops the axis", mean)


def check_rank(result: ir.Value, x: ir.Value) -> None:
    """Raise Refused if a result has more axes than its input, as a constant of one entry may cause."""
    ranks = rank_of(result), rank_of(x)
    if None not in ranks and ranks[0] != ranks[1]:
        raise Refused(f"its constants make {ranks[0]} axes of {ranks[1]}", result)


def check_vector(name: str, vector: ir.Value, x: ir.Value) -> None:
    """Raise Refused unless a scale or bias is a vector of the size of the last axis of ``x``.

    Mul and Add broadcast other sizes (a scalar, or a vector over an axis of size 1). The standard's operators do not
    guarantee it, and runtimes do not support it.
    """
    size = 0 if vector.shape is None or len(vector.shape) != 1 else vector.shape[0]
    if vector.shape is None or len(vector.shape) != 1:
        raise Refused(f"its {name} is not of one dimension", vector)
    width = x.shape[-1] if x.shape is not None and len(x.shape) else None
    if not isinstance(width, int) or size != width:
        expected = width if isinstance(width, int) else "an unknown number of"
        raise Refused(f"its {name} has {size} entries, the axis {expected}", vector)


def axes_of(reduction: ir.Node) -> list[int] | None:
    """Axes of a reduction, from its attribute (before opset 18) or its input."""
    attribute = reduction.attributes.get("axes")
    if attribute is not None:
        return [int(axis) for axis in attribute.as_ints()]
    array = constant_of(reduction.inputs[1]) if len(reduction.inputs) > 1 else None
    return None if array is None else [int(axis) for axis in array.reshape(-1)]


@dataclass(frozen=True)
class Cut:
    """A slice along one axis by constants, or one of the outputs of a Split."""

    source: ir.Value
    axis: int
    start: int
    end: int
    step: int

    def along_last(self, other: Cut) -> bool:
        """True if both slices are along the last axis."""
        last = (rank_of(self.source) or 0) - 1
        return all(cut.axis == -1 or cut.axis == last for cut in (self, other))

    def reaches(self, size: int) -> bool:
        """True if the slice ends at the end of an axis of this size."""
        return self.end >= size


def slice_of(value: ir.Value | None) -> Cut | None:
    """The source and range of a slice by constants that count from the front, or None."""
    node = producer_of(value, "Slice", "Split")
    if node is None or value is None or node.inputs[0] is None:
        return None
    if node.op_type == "Split":
        return _part_of(node, value)
    numbers = [constant_of(bound) for bound in node.inputs[1:]]
    if len(numbers) < 3 or any(number is None or number.size != 1 for number in numbers):
        return None
    start, end, axis, *step = (int(number.reshape(())) for number in numbers if number is not None)
    # Negative bounds depend on the size of the axis, which may be dynamic.
    from_front = start >= 0 and end >= 0
    return Cut(node.inputs[0], axis, start, end, step[0] if step else 1) if from_front else None


def _part_of(split: ir.Node, value: ir.Value) -> Cut | None:
    axis = split.attributes.get("axis")
    position = 0 if axis is None else axis.as_int()
    widths = [None if part.shape is None else part.shape[position] for part in split.outputs]
    index = next(i for i, part in enumerate(split.outputs) if part is value)
    if split.inputs[0] is None or not all(isinstance(width, int) for width in widths):
        return None
    # Bounds of a part are the sums of the widths before it.
    numbers = [int(width) for width in widths if isinstance(width, int)]
    return Cut(split.inputs[0], position, sum(numbers[:index]), sum(numbers[: index + 1]), 1)
