"""Set static sizes of dynamic axes.

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
    """Replace names of axes by sizes, and infer all shapes again.

    Each option is the name of an axis: ``specialize-shapes{batch=1 sequence=128}``. Dimensions that are a sum of axes
    (``past + sequence``) become numbers if all of them are given. Arithmetic on the sizes is left to later passes, such
    as simplify-shapes. An axis that no input has is refused.
    """

    name: ClassVar[str] = "specialize-shapes"

    sizes: tuple[tuple[str, int], ...] = ()
    """Axes and their sizes, each as an option."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Read `axis=size` pairs; UsageError for sizes that are no integers."""
        wrong = next((axis for axis, size in options.items() if not str(size).isdigit()), None)
        if wrong is not None:
            raise UsageError(
                f"option {wrong}={options[wrong]!r}: the size of an axis is a whole number", where=f"pass {cls.name}"
            )
        return cls(tuple((axis, int(size)) for axis, size in options.items()))

    def __str__(self) -> str:
        """The text form, with one option per axis."""
        return option_text.format_spec(self.name, self.fixed)

    @property
    def fixed(self) -> Mapping[str, int]:
        """The axes with a static size after this pass."""
        return dict(self.sizes)

    def call(self, model: ir.Model) -> PassResult:
        """Specialize inputs and outputs, and infer the shapes between them again."""
        result = PassResult(model, modified=False)
        axes = {axis for value in model.graph.inputs for axis in _axes(value)}
        sizes: dict[str, int] = {}
        for axis, size in self.sizes:
            if axis not in axes:
                there = ", ".join(sorted(axes)) or "none"
                result.refusals.append(Refusal("the inputs", f"no input has the axis {axis!r} (there are: {there})"))
            elif admitted():
                sizes[axis] = size
                result.sites.append(f"axis {axis!r}")
        if sizes:
            for graph in model.graphs():
                for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
                    _specialize(value, sizes)
            # Inferred names of dimensions may be numbers now.
            infer_again(model)
        result.modified = bool(sizes)
        return result


def _axes(value: ir.Value) -> Iterator[str]:
    for dim in value.shape or ():
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            yield from dim.value.split(SUM)


def _specialize(value: ir.Value, sizes: Mapping[str, int]) -> None:
    if value.shape is not None:
        sizes_by_dim = [(dim, size_of(dim, sizes)) for dim in value.shape]
        value.shape = ir.Shape([dim if size is None else size for dim, size in sizes_by_dim])
