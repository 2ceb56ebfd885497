"""Masks of attention as numbers, which are added to scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.optimizer.graph import name_nodes


@dataclass
class AddedMasks:
    """Each mask as numbers to be added, made once."""

    graph: ir.Graph
    name: str
    """What the first is called; the others are numbered."""
    made: dict[int, ir.Value] = field(default_factory=dict)

    def added(self, mask: ir.Value, reader: ir.Node) -> ir.Value:
        """What is added to scores: 0 where a key is seen, else the lowest finite number."""
        if id(mask) not in self.made:
            tape = ir.tape.Tape()
            lowest = number(tape, float(np.finfo(np.float32).min))
            if mask.dtype == ir.DataType.BOOL:
                added = tape.op("Where", [mask, number(tape, 0.0), lowest])
            else:  # minus infinity may stand in it
                added = tape.op("Max", [mask, lowest])
            added.shape, added.type = mask.shape, ir.TensorType(ir.DataType.FLOAT)
            name = self.name if not self.made else f"{self.name}_{len(self.made)}"
            name_nodes(tape.nodes, name)
            added.name = name
            self.graph.insert_before(reader, tape.nodes)
            self.made[id(mask)] = added
        return self.made[id(mask)]


def number(tape: ir.tape.Tape, value: float) -> ir.Value:
    """A constant of type FLOAT without axes."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, np.float32))})
