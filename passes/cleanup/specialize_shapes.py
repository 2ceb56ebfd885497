"""Give axes the only size that an engine will see.

Before:  input_ids: INT64[batch, sequence];  h: FLOAT[batch, sequence, 384]            {batch=1 sequence=128}
After:   input_ids: INT64[1, 128];  h: FLOAT[1, 128, 384]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import onnx_ir as ir

from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces import option_text
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, admitted
from planish.optimizer.ir.program import SUM, size_of
from planish.passes.cleanup._library import infer_again


@dataclass(frozen=True)
class SpecializeShapes(Pass):
    """Write sizes where the graph has names of axes, and find all shapes again.

    Each option is the name of an axis: ``specialize-shapes{batch=1 sequence=128}``. Dimensions that are a sum of axes
    (``past + sequence``) become numbers when all of them are. What the graph computes of the sizes is left to later
    passes, above all simplify-shapes. An axis that no input has is refused.
    """

    name: ClassVar[str] = "specialize-shapes"

    sizes: tuple[tuple[str, int], ...] = ()
    """Axes and their sizes, each written as an option of its own."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Read `axis=size` pairs; UsageError if a size is not a whole number."""
        wrong = next((axis for axis, size in options.items() if not str(size).isdigit()), None)
        if wrong is not None:
            raise UsageError(
                f"option {wrong}={options[wrong]!r}: the size of an axis is a whole number", where=f"pass {cls.name}"
            )
        return cls(tuple((axis, int(size)) for axis, size in options.items()))

    def __str__(self) -> str:
        """The text form, one option an axis."""
        return option_text.format_spec(self.name, self.fixed)

    @property
    def fixed(self) -> Mapping[str, int]:
        """The axes that have one size after this pass."""
        return dict(self.sizes)

    def call(self, model: ir.Model) -> PassResult:
        """Specialize the inputs and outputs, and forget what was known of the shapes between them."""
        result = PassResult(model, modified=False)
        known = {axis for value in model.graph.inputs for axis in _axes(value)}
        sizes: dict[str, int] = {}
        for axis, size in self.sizes:
            if axis not in known:
                there = ", ".join(sorted(known)) or "none"
                result.refusals.append(Refusal("the inputs", f"no input has the axis {axis!r} (there are: {there})"))
            elif admitted():
                sizes[axis] = size
                result.sites.append(f"axis {axis!r}")
        if sizes:
            for graph in model.graphs():
                for value in (*graph.inputs, *(made for node in graph for made in node.outputs)):
                    _specialize(value, sizes)
            infer_again(model)
        result.modified = bool(sizes)
        return result


def _axes(value: ir.Value) -> Iterator[str]:
    for dim in value.shape or ():
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            yield from dim.value.split(SUM)


def _specialize(value: ir.Value, sizes: Mapping[str, int]) -> None:
    if value.shape is not None:
        found = [(dim, size_of(dim, sizes)) for dim in value.shape]
        value.shape = ir.Shape([dim if size is None else size for dim, size in found])
