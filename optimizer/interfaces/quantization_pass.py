"""What all quantizing passes share: the products they are about, and which of them stay in float."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import numpy as np
import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer.interfaces.observers import ChannelObserver, statistic_of
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, StatisticRequest, admitted
from planish.optimizer.ir.edit import add_initializer, forget_unread, remove_dead, rename_duplicates
from planish.optimizer.ir.graph import (
    IN_FLOAT,
    constant_of,
    is_weight_matrix,
    location_of,
    producer_of,
    sizes_of,
    sole_user,
    vector_operand,
)
from planish.optimizer.ir.lazy_tensors import lazy

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_AS_FLOAT = "planish.as_float"
"""Under which a tensor of 16 bits keeps its float form."""


@dataclass(frozen=True)
class MatMulSite:
    """A product with a constant matrix.

    Operands are looked up when they are asked for: where one product reads another, rewriting the first gives the
    second another operand.
    """

    node: ir.Node
    main: ir.Graph
    """The main graph of its model; the product may stand in a subgraph."""

    @property
    def data(self) -> ir.Value:
        """The activation."""
        return _operand(self.node, 0)

    @property
    def weight(self) -> ir.Value:
        """The matrix, or what a Cast makes of it."""
        return _operand(self.node, 1)

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The entries of the matrix; ValueError once the product reads something else."""
        tensor = matrix_behind(self.weight)
        if tensor is None:
            raise ValueError(f"{self.name!r} has no constant matrix any more")
        return tensor

    @property
    def observable(self) -> bool:
        """Whether the activation can be shown as an output: a value of a branch or of the body of a loop cannot."""
        return self.data.graph is self.main and not self.data.is_initializer()

    @property
    def name(self) -> str:
        """How options and the lock call it: by its product, whose name stays the same."""
        return _name_of(self.node)


@dataclass(frozen=True)
class QuantizationPass(Pass):
    """Rounds the matrices of products; each product is a site that may be skipped by name."""

    exact: ClassVar[bool] = False

    minimum: Annotated[int, Ge(0)] = 4096
    """Elements that a matrix must have to be worth it."""

    skip: tuple[str, ...] = ()
    """Names of products that stay in float: those that would cost the most accuracy."""

    correct_bias: bool = False
    """Whether the mean error of each product's rounded matrix, over calibration data, is taken out of the bias behind
    it (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2)."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """The mean of each channel, if biases are corrected."""
        corrected = [site for site in self.candidates(model) if _bias_of(site)] if self.correct_bias else []
        return [StatisticRequest(site.data, ChannelObserver) for site in corrected]

    def unsupported(self, site: MatMulSite) -> str | None:
        """Why this form cannot say this matrix; nothing if it can."""
        return None

    def not_ready(self, site: MatMulSite) -> str | None:
        """Why a product that could be rounded cannot be rounded now; nothing if it can."""
        return None

    @abc.abstractmethod
    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """The matrix of a site as its product will see it, float32, shape as given."""

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """An activation as a product will see it; as it is, unless the form rounds it."""
        return data

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Write all of these in few bits."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every such MatMul of the main graph and of its subgraphs."""
        result = PassResult(model, modified=False)
        taken: list[MatMulSite] = []
        products = products_of(model, "MatMul", "Gemm")
        unknown = set(self.skip) - {_name_of(node) for node in products}
        result.refusals += [
            Refusal(name, "it is to be skipped, and there is no such product") for name in sorted(unknown)
        ]
        for node in products:
            site = site_of(node, model.graph)
            reason = _not_a_site(node) if site is None else self._reason(site)
            if site is None or reason is not None:
                result.refusals.append(Refusal.at(node, reason or "", node.inputs[1]))
            elif admitted():
                result.sites.append(location_of(node))
                taken.append(site)
        corrected = [self._correct(model.graph, site) for site in taken] if self.correct_bias else []
        if taken:
            read = [site.weight.producer() for site in taken]
            self.rewrite(model, taken)
            _tidy(model, [node for node in read if node is not None])
        result.modified = bool(taken)
        result.facts["quantized"] = len(taken)
        if self.correct_bias:
            result.facts["corrected"] = sum(corrected)
        return result

    def candidates(self, model: ir.Model) -> list[MatMulSite]:
        """Products that can be rounded, those that are skipped among them."""
        sites = (site_of(node, model.graph) for node in products_of(model))
        return [site for site in sites if site is not None and self._misfit(site) is None]

    def _correct(self, graph: ir.Graph, site: MatMulSite) -> bool:
        """Add the mean of what rounding takes away to the bias behind a product; False if there is none."""
        place, channels = _bias_of(site), statistic_of(site.data, ChannelObserver)
        if place is None or channels is None:
            return False
        node, index = place
        bias = constant_of(node.inputs[index])
        if bias is None:
            return False
        corrected = bias + channels.mean @ (site.tensor.numpy() - self.dequantized_weight(site))
        node.replace_input_with(index, add_initializer(graph, f"{site.name}_corrected", corrected.astype(np.float32)))
        return True

    def _reason(self, site: MatMulSite) -> str | None:
        """Why this product stays in float."""
        if site.name in self.skip:
            return "it is skipped, as the pass was asked to"
        misfit, not_ready = self._misfit(site), self.not_ready(site)
        if misfit is None and not_ready is not None and not site.observable:
            return "its activation is a value of a subgraph or a constant, which calibration cannot observe"
        return misfit or not_ready

    def _misfit(self, site: MatMulSite) -> str | None:
        """Why this matrix cannot be rounded, or is not worth it."""
        if IN_FLOAT in site.node.metadata_props:
            return "it multiplies the channels that stand out"
        if site.tensor.dtype is not ir.DataType.FLOAT:
            return f"its matrix is {site.tensor.dtype}, not FLOAT"
        if site.tensor.size < self.minimum:
            return f"its matrix has {site.tensor.size} elements, fewer than {self.minimum}"
        if not _finite(site):
            return "its matrix holds NaN or infinity"
        return self.unsupported(site)


def _name_of(product: ir.Node) -> str:
    return product.name or product.outputs[0].name or ""


def products_of(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """Every product of the main graph and its subgraphs (branches of If, bodies of Loop), in order."""
    kinds = op_types or ("MatMul",)
    return [node for graph in model.graphs() for node in graph if node.op_type in kinds and node.domain == ""]


def site_of(node: ir.Node, main: ir.Graph) -> MatMulSite | None:
    """The product with a constant matrix that a MatMul is, if it is one; ``main`` is the main graph around it."""
    given = node.op_type == "MatMul" and node.inputs[0] is not None and matrix_behind(node.inputs[1]) is not None
    return MatMulSite(node, main) if given else None


def matrix_behind(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant matrix that a value is, also one of 16 bits behind a Cast to float; None if it is none.

    The float form is made when it is read, and kept with the tensor of 16 bits, which copies of a model share.
    """
    if is_weight_matrix(value) and value is not None:
        return value.const_value
    made_float = producer_of(value, "Cast")
    stored = None if made_float is None else made_float.inputs[0]
    halves = stored.const_value if stored is not None and is_weight_matrix(stored) else None
    if made_float is None or halves is None or halves.dtype not in _HALVES:
        return None
    if made_float.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        return None
    if _AS_FLOAT not in halves.meta:
        shape, name = sizes_of(halves), f"{halves.name}_float"
        halves.meta[_AS_FLOAT] = lazy(lambda: halves.numpy().astype(np.float32), ir.DataType.FLOAT, shape, name)
    return cast("ir.TensorProtocol", halves.meta[_AS_FLOAT])


def sites_by_data(model: ir.Model) -> list[list[MatMulSite]]:
    """Products of the main graph with constant float matrices, by the activation that they read."""
    groups: dict[ir.Value, list[MatMulSite]] = {}
    for site in (site_of(node, model.graph) for node in model.graph if node.domain == ""):
        if site is None or IN_FLOAT in site.node.metadata_props or site.tensor.dtype is not ir.DataType.FLOAT:
            continue
        groups.setdefault(site.data, []).append(site)
    return list(groups.values())


def refusals_in_subgraphs(model: ir.Model) -> list[Refusal]:
    """One for each product of a branch or of the body of a loop: what a pass cannot do that needs to observe it."""
    nodes = [node for node in products_of(model) if node.graph is not model.graph]
    return [Refusal.at(node, "it stands in a subgraph, whose values calibration cannot observe") for node in nodes]


def _not_a_site(node: ir.Node) -> str:
    """Why a product is none with a constant matrix that this could be about."""
    constant = matrix_behind(node.inputs[1]) is not None
    if producer_of(node.inputs[1], "DequantizeLinear") is not None:
        return "its right operand is in few bits already"
    if node.op_type == "Gemm" and constant:
        return "it is a Gemm: unfuse-gemm{anywhere=true} writes it as a product and a sum"
    return "its right operand is not a constant matrix"


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"input {index} of {node.name!r} was left out")
    return value


def _tidy(model: ir.Model, replaced: Sequence[ir.Node]) -> None:
    """Remove Casts of matrices that nobody reads any more, and constants; make names unique again.

    What is written is named after what was there (`a_float` of `a`), and another value may have that name already.
    """
    for node in replaced:
        if node.graph is not None:
            remove_dead(node.graph, node)
    for graph in model.graphs():
        forget_unread(graph, graph.initializers.values())
    rename_duplicates(model.graph)


def _finite(site: MatMulSite) -> bool:
    """Whether all entries of a matrix are numbers; it is read once for all who ask."""
    if "finite" not in site.tensor.meta:
        site.tensor.meta["finite"] = bool(np.isfinite(site.tensor.numpy()).all())
    return bool(site.tensor.meta["finite"])


def _bias_of(site: MatMulSite) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector that alone reads a product, and which of its inputs that is."""
    node = sole_user(site.node.outputs[0])
    if node is None or node.op_type != "Add" or node.domain != "":
        return None
    index = vector_operand(node, sizes_of(site.tensor)[1])
    return None if index is None or node.graph is not site.node.graph else (node, index)


def one_of(*numbers: int) -> Callable[[int], int]:
    """A check of an option that takes a few numbers."""

    def check(number: int) -> int:
        if number not in numbers:
            raise ValueError(f"it must be one of {', '.join(map(str, numbers))}")
        return number

    return check
