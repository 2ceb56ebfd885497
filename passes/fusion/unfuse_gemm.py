"""Write products of the rows of all texts as MatMul and Add, which need no rows.

Before:  f = Reshape (x, {-1,768});  g = Gemm (f, w, b);  r = Reshape (g, {2,5,3072})           x: [2,5,768]
After:   p = MatMul (x, w);  r = Add (p, b)

A layer that multiplies (`torch.addmm`) arrives like this from GPT-2; passes that look for products of tokens find one
spelling. A target that runs a Gemm faster gets it back from its legalization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.optimizer.graph import is_weight_matrix, made_by, rank_of
from planish.passes.fusion._fusion import Declined, Fusion, used_by

_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


@dataclass(frozen=True)
class Product:
    """A match: what is flattened, the product, and what has the axes of texts and tokens again."""

    x: ir.Value
    gemm: ir.Node
    result: ir.Value


@dataclass(frozen=True)
class UnfuseGemm(Fusion[Product]):
    """Replace a Gemm between a Reshape that joins the leading axes and one that parts them by MatMul and Add.

    A Gemm of what has two axes anyway stays: a head behind a pooler is one.
    """

    name: ClassVar[str] = "unfuse-gemm"
    root: ClassVar[str] = "Gemm"
    since: ClassVar[int] = 7

    def pattern(self, node: ir.Node) -> Product | None:
        """A Gemm and both reshapes, whose leading axes are the same."""
        flatten = made_by(node.inputs[0], "Reshape")
        part = used_by(node.outputs[0], "Reshape")
        x = None if flatten is None else flatten.inputs[0]
        if part is None or x is None or x.shape is None or part.outputs[0].shape is None:
            return None
        before, after = x.shape, part.outputs[0].shape
        rows = None if node.inputs[0] is None or node.inputs[0].shape is None else node.inputs[0].shape
        kept = len(before) == len(after) > 2 and before[:-1] == after[:-1] and rows is not None
        named = all(isinstance(dim, int) or dim.value is not None for dim in before)
        return (
            Product(x, node, part.outputs[0])
            if kept and named and rows is not None and rows[-1] == before[-1]
            else None
        )

    def check(self, match: Product) -> None:
        """Nothing is transposed or scaled, and each column has one bias."""
        written = {name: match.gemm.attributes[name].value for name in _PLAIN if name in match.gemm.attributes}
        other = next((name for name, value in written.items() if value != _PLAIN[name]), None)
        if other is not None:
            raise Declined(f"its {other} is {written[other]}", match.gemm)
        if not is_weight_matrix(match.gemm.inputs[1]):
            raise Declined("its second operand is no constant matrix", match.gemm.inputs[1])
        bias = match.gemm.inputs[2] if len(match.gemm.inputs) > 2 else None
        if bias is not None and rank_of(bias) != 1:
            raise Declined("its third operand has not one entry for each column", bias)

    def rewrite(self, match: Product) -> tuple[ir.Value, list[ir.Node]]:
        """The product, and the sum if there is a bias."""
        product = ir.node("MatMul", [match.x, match.gemm.inputs[1]])
        bias = match.gemm.inputs[2] if len(match.gemm.inputs) > 2 else None
        if bias is None:
            return match.result, [product]
        product.outputs[0].shape, product.outputs[0].type = match.result.shape, match.result.type
        return match.result, [product, ir.node("Add", [product.outputs[0], bias])]
