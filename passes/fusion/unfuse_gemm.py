"""Write products of the rows of all texts as MatMul and Add, which need no rows.

Before:  f = Reshape (x, {-1,768});  g = Gemm (f, w, b);  r = Reshape (g, {2,5,3072})           x: [2,5,768]
After:   p = MatMul (x, w);  r = Add (p, b)

         (anywhere)
Before:  r = Gemm <transB=1> (x, w, b)                                                          x: [rows,768]
After:   p = MatMul (x, w_turned);  r = Add (p, b)                                              w_turned: w transposed

A layer that multiplies (`torch.addmm`) arrives like this from GPT-2; passes that look for products of tokens find one
spelling. A target that runs a Gemm faster gets it back from its legalization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.quantization_pass import matrix_behind
from planish.optimizer.interfaces.rewrite_pass import Refused, RewritePass
from planish.optimizer.ir.edit import add_initializer
from planish.optimizer.ir.graph import is_weight_matrix, producer_of, rank_of, sizes_of
from planish.optimizer.ir.lazy_tensors import lazy
from planish.passes.fusion._match import used_by

_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


@dataclass(frozen=True)
class GemmMatch:
    """A match: the flattened value, the Gemm, and the value with batch and token axes restored."""

    x: ir.Value
    gemm: ir.Node
    result: ir.Value


@dataclass(frozen=True)
class UnfuseGemm(RewritePass[GemmMatch]):
    """Replace a Gemm between a Reshape that merges the leading axes and one that splits them by MatMul and Add.

    1. The leading axes are equal on both sides, nothing is transposed or scaled, and the bias is a vector.
    2. A Gemm of a value of rank two (a head after a pooler) stays by default. If requested, its matrix must be
       constant, and is transposed and scaled beforehand; a 16-bit matrix stays in 16 bits.
    """

    name: ClassVar[str] = "unfuse-gemm"
    root: ClassVar[str] = "Gemm"
    since: ClassVar[int] = 7

    anywhere: bool = False
    """Case 2: rewrite every Gemm with a constant matrix, for passes that look for MatMuls."""

    def pattern(self, node: ir.Node) -> GemmMatch | None:
        """Match a Gemm and both reshapes with equal leading axes; or the Gemm alone if requested."""
        between = self._between_reshapes(node)
        if between is not None or not self.anywhere or node.inputs[0] is None:
            return between
        return GemmMatch(node.inputs[0], node, node.outputs[0])

    def _between_reshapes(self, node: ir.Node) -> GemmMatch | None:
        flatten = producer_of(node.inputs[0], "Reshape")
        part = used_by(node.outputs[0], "Reshape")
        x = None if flatten is None else flatten.inputs[0]
        if part is None or x is None or x.shape is None or part.outputs[0].shape is None:
            return None
        before, after = x.shape, part.outputs[0].shape
        rows = None if node.inputs[0] is None or node.inputs[0].shape is None else node.inputs[0].shape
        kept = len(before) == len(after) > 2 and before[:-1] == after[:-1] and rows is not None
        named = all(isinstance(dim, int) or dim.value is not None for dim in before)
        return (
            GemmMatch(x, node, part.outputs[0])
            if kept and named and rows is not None and rows[-1] == before[-1]
            else None
        )

    def check(self, match: GemmMatch) -> None:
        """Check that transposition and scaling can be done beforehand, and that the bias is a vector."""
        gemm, bias = match.gemm, _bias_of(match.gemm)
        written = {name: gemm.attributes[name].value for name in _PLAIN if name in gemm.attributes}
        allowed = ("transB", "alpha") if self.anywhere else ()
        odd = [name for name, value in written.items() if value != _PLAIN[name] and name not in allowed]
        if odd and not (odd == ["beta"] and bias is None):
            raise Refused(f"its {odd[0]} is {written[odd[0]]}", gemm)
        if _stored(gemm.inputs[1]) is None or not (self.anywhere or is_weight_matrix(gemm.inputs[1])):
            raise Refused("its second operand is no constant matrix", gemm.inputs[1])
        if _alpha_of(gemm) != 1 and gemm.inputs[1] is not None and gemm.inputs[1].dtype is not ir.DataType.FLOAT:
            raise Refused(f"its alpha is {_alpha_of(gemm)}, and its matrix is not of type FLOAT", gemm)
        if bias is not None and match.result is not gemm.outputs[0] and rank_of(bias) != 1:
            raise Refused("its third operand has not one entry for each column", bias)

    def rewrite(self, match: GemmMatch) -> tuple[ir.Value, list[ir.Node]]:
        """Build the MatMul, and the Add if there is a bias."""
        bias = _bias_of(match.gemm)
        matrix, nodes = _matrix(match.gemm)
        product = ir.node("MatMul", [match.x, matrix])
        nodes.append(product)
        if bias is None:
            return match.result, nodes
        product.outputs[0].shape, product.outputs[0].type = match.result.shape, match.result.type
        return match.result, [*nodes, ir.node("Add", [product.outputs[0], bias])]


def _bias_of(gemm: ir.Node) -> ir.Value | None:
    return gemm.inputs[2] if len(gemm.inputs) > 2 else None


def _alpha_of(gemm: ir.Node) -> float:
    return gemm.attributes.get_float("alpha", 1.0)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The constant matrix of a value, directly or before a Cast; None if there is none."""
    if is_weight_matrix(value) or matrix_behind(value) is None:
        return value if is_weight_matrix(value) else None
    made_float = producer_of(value, "Cast")
    return None if made_float is None else made_float.inputs[0]


def _matrix(gemm: ir.Node) -> tuple[ir.Value | None, list[ir.Node]]:
    """The matrix for the MatMul, and its Cast if there is one."""
    given, alpha = gemm.inputs[1], np.float32(_alpha_of(gemm))
    turned = bool(gemm.attributes.get_int("transB", 0))
    stored = _stored(given)
    tensor = None if stored is None else stored.const_value
    if stored is None or tensor is None or (not turned and alpha == 1):
        return given, []

    def read() -> np.ndarray:
        array = tensor.numpy()
        scaled = array if alpha == 1 else array * alpha
        return np.ascontiguousarray(scaled.T if turned else scaled)

    name, owner, key = f"{stored.name}_turned", stored.graph, f"planish.turned {turned} {alpha}"
    if not isinstance(owner, ir.Graph):
        raise ValueError(f"{stored.name!r} is no constant of a graph")
    matrix, sizes = stored.meta.get(key), sizes_of(tensor)
    if matrix is None or matrix.graph is not owner:  # not made yet, or for the model that this one is a copy of
        transposed = lazy(read, tensor.dtype, sizes[::-1] if turned else sizes, name)
        stored.meta[key] = matrix = add_initializer(owner, name, transposed)
    if stored is given:
        return matrix, []
    cast = ir.node("Cast", [matrix], {"to": ir.DataType.FLOAT})
    cast.outputs[0].shape, cast.outputs[0].type = matrix.shape, ir.TensorType(ir.DataType.FLOAT)
    return cast.outputs[0], [cast]
