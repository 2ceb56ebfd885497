"""Evaluate expressions of constants.

Before:  a = Constant <value_ints=[2]> ();  b = Constant <value_ints=[3]> ();  s = Mul (a, b);  r = Reshape (x, s)
After:   r = Reshape (x, s)          (s is an initializer that holds 6)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common
from annotated_types import Ge
from onnxscript import optimizer

from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.optimizer.ir.graph import constant_of, is_random, opset_of
from planish.passes.cleanup import _library

_SPLIT_INTO = 18
"""Opset from which Split has the attribute num_outputs."""
_GROWING = frozenset(
    {
        "AffineGrid", "BlackmanWindow", "CenterCropPad", "Col2Im", "ConstantOfShape", "ConvTranspose", "DFT", "Einsum",
        "Expand", "GridSample", "HammingWindow", "HannWindow", "MaxUnpool", "MelWeightMatrix", "OneHot", "Pad", "Range",
        "Resize", "RoiAlign", "STFT", "Tile", "Upsample",
    }
)  # fmt: skip
"""Operators whose result may be larger than their inputs, with a size that inference may not know."""
_AXES_AS_INPUTS = 13
"""Opset from which axes are inputs."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate constant expressions whose results do not increase the size of the model.

    1. A result of at most ``limit`` elements replaces its expression.
    2. A larger result replaces it only if it is not larger than its inputs (a transposed weight).
    3. ``Constant`` nodes become initializers, so that other passes handle one form.

    Built on the folder of onnxscript, which also resolves shape arithmetic on known dimensions. Functions are skipped,
    since their attributes are unknown, and so are random operators and inputs with default values.
    """

    name: ClassVar[str] = "fold-constants"

    limit: Annotated[int, Ge(0)] = 1024
    """Maximum elements of a result that may replace a smaller expression."""

    def call(self, model: ir.Model) -> PassResult:
        """Fold, then replace `Constant` nodes by initializers."""
        # Later passes look for weights among initializers only.
        lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        return _library.run(model, self._fold, lift)

    def _fold(self, model: ir.Model) -> None:
        version = opset_of(model)
        kept = [node for graph in model.graphs() for node in graph if _stays(node, version)]
        with _library.hidden(kept), _without_functions(model), _without_defaults(model), _with_types(model):
            optimizer.fold_constants_ir(
                model,
                onnx_shape_inference=True,
                input_size_limit=max(8192, self.limit),
                output_size_limit=self.limit,
                should_fold=self._should_fold,
            )

    def _should_fold(self, node: ir.Node) -> bool | None:
        """False for results that would be discarded for their size, or have an unknown size: the folder computes them
        first."""
        most = max(self.limit, sum(value.const_value.size for value in node.inputs if value and value.const_value))
        if node.op_type == "Range":
            return None if _length_of_range(node) <= most else False
        for value in node.outputs:
            sizes = None if value.shape is None else [dim for dim in value.shape if isinstance(dim, int)]
            if sizes is None or value.shape is None or len(sizes) < len(value.shape):
                return False if node.op_type in _GROWING else None
            if math.prod(sizes) > most:
                return False
        return None


def _length_of_range(node: ir.Node) -> float:
    """Number of entries of a Range of constants, also of vectors of one entry, which inference rejects and runtimes
    accept; infinity if an end or the step is unknown."""
    tensors = [None if value is None else constant_of(value) for value in node.inputs]
    numbers = [float(tensor.item()) for tensor in tensors if tensor is not None and tensor.size == 1]
    if len(numbers) < len(tensors) or numbers[2] == 0 or not all(map(math.isfinite, numbers)):
        return math.inf
    start, limit, step = numbers
    return max(0, math.ceil((limit - start) / step))


def _stays(node: ir.Node, version: int) -> bool:
    """True if the folder would change the result of a node of this opset, or fail on it."""
    if node.domain != "":
        return False
    flags = {name: attr.as_int() for name, attr in node.attributes.items() if attr.type is ir.AttributeType.INT}
    match node.op_type:
        case "CastLike":  # it would become a Cast without these
            return flags.get("saturate", 1) == 0 or "round_mode" in node.attributes
        case "SplitToSequence":  # pieces of a size that is not known; `keepdims`, which a given split overrules
            has_constant_axes = len(node.inputs) > 1 and constant_of(node.inputs[1]) is not None
            return not has_constant_axes or flags.get("keepdims", 1) == 0 or version < _SPLIT_INTO
        case "ConcatFromSequence":  # axes of Unsqueeze as an input
            return flags.get("new_axis", 0) == 1 and version < _AXES_AS_INPUTS
    return is_random(node)


@contextmanager
def _without_functions(model: ir.Model) -> Iterator[None]:
    functions = dict(model.functions)
    model.functions.clear()
    try:
        yield
    finally:
        model.functions.update(functions)


@contextmanager
def _without_defaults(model: ir.Model) -> Iterator[None]:
    """Remove the default values of inputs in the block."""
    defaults = {value: value.const_value for value in model.graph.inputs if value.const_value is not None}
    for value in defaults:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in defaults.items():
            value.const_value = tensor


@contextmanager
def _with_types(model: ir.Model) -> Iterator[None]:
    """Restore the types of values that inference cleared."""
    types = [(value, value.type) for graph in model.graphs() for node in graph for value in node.outputs]
    try:
        yield
    finally:
        for value, declared in types:
            value.type = declared if value.type is None else value.type
