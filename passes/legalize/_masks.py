"""Additive attention masks: numbers that are added to scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.edit import copy_location, name_nodes, replace_value
from planish.passes._mask_values import LOWEST, mask_values, number


@dataclass
class AddedMasks:
    """The additive form of each mask, created once."""

    graph: ir.Graph
    name: str
    """Name prefix of the masks."""
    made: dict[int, ir.Value] = field(default_factory=dict)
    rows: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def added(self, mask: ir.Value, reader: ir.Node) -> ir.Value:
        """The number added to scores: 0 for visible keys, else the lowest finite number.

        A fully masked row gives the mean of all values with it: `shares` turns it into zeros.
        """
        if id(mask) not in self.made:
            tape = ir.tape.Tape()
            lowest = number(tape, LOWEST)
            if mask.dtype == ir.DataType.BOOL:
                added = tape.op("Where", [mask, number(tape, 0.0), lowest])
            else:  # minus infinity may stand in it
                added = tape.op("Max", [mask, lowest])
            added.shape, added.type = mask.shape, ir.TensorType(ir.DataType.FLOAT)
            # Numbered by creation, so that equal graphs get equal names.
            name = self.name if not self.made else f"{self.name}_{len(self.made)}"
            name_nodes(tape.nodes, name)
            added.name = name
            self.graph.insert_before(reader, tape.nodes)
            self.made[id(mask)] = added
        return self.made[id(mask)]

    def shares(self, mask: ir.Value, reader: ir.Node) -> ir.Value | None:
        """Factors for rows of results: 1, 0 for a fully masked row, NaN where the mask is NaN.

        None if all numbers of the mask are above the lowest one, which stands for minus infinity as in ONNX Runtime.
        The shape is that of the mask with 1 for the keys.
        """
        held = mask_values(mask)
        # Such a mask hides nothing completely: no factors are needed.
        if mask.dtype != ir.DataType.BOOL and held.low > LOWEST and not held.hides and not held.nan:
            return None
        if mask not in self.rows:
            tape = ir.tape.Tape()
            last, one, zero = line_of(tape, -1), number(tape, 1.0), number(tape, 0.0)
            if mask.dtype == ir.DataType.BOOL:
                share = tape.op("ReduceMax", [tape.op("Where", [mask, one, zero]), last], {"keepdims": 1})
            else:
                highest = tape.op("ReduceMax", [mask, last], {"keepdims": 1})
                share = tape.op("Where", [tape.op("Greater", [highest, number(tape, LOWEST)]), one, zero])
            if held.nan:  # a row is NaN as a whole; the highest of NaN is another number on some processors
                first = tape.op("Slice", [mask, line_of(tape, 0), line_of(tape, 1), last])
                share = tape.op("Where", [tape.op("IsNaN", [first]), first, share])
            name_nodes(tape.nodes, f"{self.name}_share_{len(self.rows)}")
            share.type = ir.TensorType(ir.DataType.FLOAT)
            share.shape = None if mask.shape is None else ir.Shape([*mask.shape[:-1], 1])
            self.graph.insert_before(reader, tape.nodes)
            self.rows[mask] = share
        return self.rows[mask]


def line_of(tape: ir.tape.Tape, *sizes: int) -> ir.Value:
    """A constant of integers, shape (sizes,)."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(sizes, np.int64))})


def scale_rows(graph: ir.Graph, node: ir.Node, share: ir.Value) -> None:
    """Multiply the rows of an attention's result."""
    old = node.outputs[0]
    product = ir.node("Mul", [old, share], name=f"{old.name}_shares")
    replace_value(old, product.outputs[0], "of_all_rows")
    # replace_value redirected all readers of old, the new Mul as well.
    product.replace_input_with(0, old)
    copy_location(node, product)
    graph.insert_after(node, product)
