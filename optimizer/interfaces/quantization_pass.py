"""Base class of quantization passes: the MatMuls that they may quantize, and the reasons why some stay in float."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import numpy as np
import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer.interfaces.observers import ChannelObserver, Observer, statistic_of
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
"""Key of the float form in the metadata of a 16-bit tensor."""


@dataclass(frozen=True)
class MatMulSite:
    """A MatMul with a constant matrix.

    Operands are read from the node each time: if one MatMul reads another, rewriting the first changes the operand of
    the second.
    """

    node: ir.Node
    main: ir.Graph
    """The main graph of its model; the MatMul may be in a subgraph."""

    @property
    def data(self) -> ir.Value:
        """The activation: the left operand."""
        return _operand(self.node, 0)

    @property
    def weight(self) -> ir.Value:
        """The matrix, or the output of a Cast of it."""
        return _operand(self.node, 1)

    @property
    def tensor(self) -> ir.TensorProtocol:
        """Entries of the matrix, float; ValueError if the MatMul has been rewritten to read something else."""
        tensor = matrix_behind(self.weight)
        if tensor is None:
            raise ValueError(f"{self.name!r} has no constant matrix any more")
        return tensor

    @property
    def observable(self) -> bool:
        """True if the activation can be an output of the main graph: a value of a branch or of a loop's body cannot."""
        return self.data.graph is self.main and not self.data.is_initializer()

    @property
    def name(self) -> str:
        """Name in options and in the lock: that of the MatMul, which passes do not change."""
        return _name_of(self.node)


@dataclass(frozen=True)
class QuantizationPass(Pass):
    """Base of passes that quantize the matrices of MatMuls; each MatMul is a site that may be skipped by name."""

    exact: ClassVar[bool] = False

    minimum: Annotated[int, Ge(0)] = 4096
    """Smallest number of elements of a matrix that is quantized."""

    skip: tuple[str, ...] = ()
    """Names of MatMuls that stay in float: those that would cost the most accuracy."""

    correct_bias: bool = False
    """Subtract the mean error of each quantized MatMul over calibration data from the bias that follows it (Nagel et
    al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2)."""

    @property
    def site_statistics(self) -> Sequence[type[Observer]]:
        """Statistics of the activation of each candidate that the pass needs."""
        return ()

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """Requests of the statistics of each candidate, and of channel means if biases are corrected."""
        kinds = self.site_statistics
        # Reading a graph for candidates reads its matrices: it is left out where nothing is requested.
        sites = self.candidates(model) if kinds or self.correct_bias else []
        corrected = [site for site in sites if _bias_of(site)] if self.correct_bias else []
        means = [StatisticRequest(site.data, ChannelObserver) for site in corrected]
        return [*means, *(StatisticRequest(site.data, kind) for site in sites for kind in kinds)]

    def unsupported(self, site: MatMulSite) -> str | None:
        """Reason why the pass can never quantize the matrix of a site; None if it can."""
        return None

    def not_ready(self, site: MatMulSite) -> str | None:
        """Reason why a site that could be quantized cannot be now, for want of statistics; None if it can."""
        return None

    @abc.abstractmethod
    def dequantized_weight(self, site: MatMulSite) -> np.ndarray:
        """The matrix of a site that the quantized MatMul computes with, float32, same shape."""

    def dequantized_input(self, site: MatMulSite, data: np.ndarray) -> np.ndarray:
        """The activation that the quantized MatMul computes with; ``data`` itself if activations stay in float."""
        return data

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, sites: list[MatMulSite]) -> None:
        """Quantize all of these sites."""

    def call(self, model: ir.Model) -> PassResult:
        """Quantize the MatMuls of the main graph and of its subgraphs."""
        result = PassResult(model, modified=False)
        sites: list[MatMulSite] = []
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
                sites.append(site)
        # Before the rewrite: afterwards the matrices in float are gone.
        corrected = [self._correct_bias(model.graph, site) for site in sites] if self.correct_bias else []
        if sites:
            producers = [site.weight.producer() for site in sites]
            self.rewrite(model, sites)
            _clean_up(model, [node for node in producers if node is not None])
        result.modified = bool(sites)
        result.facts["quantized"] = len(sites)
        if self.correct_bias:
            result.facts["corrected"] = sum(corrected)
        return result

    def candidates(self, model: ir.Model) -> list[MatMulSite]:
        """MatMuls that the pass can quantize, skipped ones included."""
        sites = (site_of(node, model.graph) for node in products_of(model))
        return [site for site in sites if site is not None and self._no_candidate(site) is None]

    def _correct_bias(self, graph: ir.Graph, site: MatMulSite) -> bool:
        """Add the mean of what quantization subtracts to the bias that follows a MatMul; False if there is none."""
        bias_input, channels = _bias_of(site), statistic_of(site.data, ChannelObserver)
        if bias_input is None or channels is None:
            return False
        node, index = bias_input
        bias = constant_of(node.inputs[index])
        if bias is None:
            return False
        corrected = bias + channels.mean @ (site.tensor.numpy() - self.dequantized_weight(site))
        node.replace_input_with(index, add_initializer(graph, f"{site.name}_corrected", corrected.astype(np.float32)))
        return True

    def _reason(self, site: MatMulSite) -> str | None:
        """Reason why a MatMul stays in float; None if it does not."""
        if site.name in self.skip:
            return "it is skipped, as the pass was asked to"
        no_candidate, not_ready = self._no_candidate(site), self.not_ready(site)
        # Statistics of such a site are missing whatever data are given: advice to calibrate would not help.
        if no_candidate is None and not_ready is not None and not site.observable:
            return "its activation is a value of a subgraph or a constant, which calibration cannot observe"
        return no_candidate or not_ready

    def _no_candidate(self, site: MatMulSite) -> str | None:
        """Reason why the matrix of a site cannot or should not be quantized; None if it is a candidate."""
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
    """Nodes of these types in the main graph and its subgraphs (branches of If, bodies of Loop), in order."""
    kinds = op_types or ("MatMul",)
    return [node for graph in model.graphs() for node in graph if node.op_type in kinds and node.domain == ""]


def site_of(node: ir.Node, main: ir.Graph) -> MatMulSite | None:
    """The site of a node; None unless it is a MatMul with a constant matrix. ``main`` is its model's main graph."""
    is_site = node.op_type == "MatMul" and node.inputs[0] is not None and matrix_behind(node.inputs[1]) is not None
    return MatMulSite(node, main) if is_site else None


def matrix_behind(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant matrix of a value, or that of 16 bits in front of a Cast to float; None if there is none.

    The float form is computed when it is read. It is kept with the 16-bit tensor, which copies of a model share.
    """
    if is_weight_matrix(value) and value is not None:
        return value.const_value
    cast_node = producer_of(value, "Cast")
    operand = None if cast_node is None else cast_node.inputs[0]
    halves = operand.const_value if operand is not None and is_weight_matrix(operand) else None
    if cast_node is None or halves is None or halves.dtype not in _HALVES:
        return None
    if cast_node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        return None
    # Kept: what passes store with the float form must be found there by the next reader.
    if _AS_FLOAT not in halves.meta:
        shape, name = sizes_of(halves), f"{halves.name}_float"
        halves.meta[_AS_FLOAT] = lazy(lambda: halves.numpy().astype(np.float32), ir.DataType.FLOAT, shape, name)
    return cast("ir.TensorProtocol", halves.meta[_AS_FLOAT])


def sites_by_data(model: ir.Model) -> list[list[MatMulSite]]:
    """Sites of the main graph with float matrices, grouped by the activation that they read."""
    groups: dict[ir.Value, list[MatMulSite]] = {}
    for site in (site_of(node, model.graph) for node in model.graph if node.domain == ""):
        if site is None or IN_FLOAT in site.node.metadata_props or site.tensor.dtype is not ir.DataType.FLOAT:
            continue
        groups.setdefault(site.data, []).append(site)
    return list(groups.values())


def refusals_in_subgraphs(model: ir.Model) -> list[Refusal]:
    """Refusals of a pass that needs statistics: one for each MatMul of a branch or of a loop's body."""
    nodes = [node for node in products_of(model) if node.graph is not model.graph]
    return [Refusal.at(node, "it stands in a subgraph, whose values calibration cannot observe") for node in nodes]


def _not_a_site(node: ir.Node) -> str:
    """Reason why a MatMul or Gemm is not a site."""
    if producer_of(node.inputs[1], "DequantizeLinear") is not None:
        return "its right operand is in few bits already"
    if node.op_type == "Gemm" and matrix_behind(node.inputs[1]) is not None:
        return "it is a Gemm: unfuse-gemm{anywhere=true} writes it as a product and a sum"
    return "its right operand is not a constant matrix"


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"input {index} of {node.name!r} was left out")
    return value


def _clean_up(model: ir.Model, producers: Sequence[ir.Node]) -> None:
    """Remove Casts of matrices, and constants, that nothing reads any more; make names unique."""
    for node in producers:
        if node.graph is not None:
            remove_dead(node.graph, node)
    for graph in model.graphs():
        forget_unread(graph, graph.initializers.values())
    # New values are named after old ones (`a_float` of `a`), and the model may have such names already.
    rename_duplicates(model.graph)


def _finite(site: MatMulSite) -> bool:
    """True if all entries of the matrix are finite; computed once for each tensor."""
    if "finite" not in site.tensor.meta:
        site.tensor.meta["finite"] = bool(np.isfinite(site.tensor.numpy()).all())
    return bool(site.tensor.meta["finite"])


def _bias_of(site: MatMulSite) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector that is the only reader of a MatMul, and the index of the vector."""
    node = sole_user(site.node.outputs[0])
    if node is None or node.op_type != "Add" or node.domain != "":
        return None
    index = vector_operand(node, sizes_of(site.tensor)[1])
    return None if index is None or node.graph is not site.node.graph else (node, index)


def one_of(*numbers: int) -> Callable[[int], int]:
    """Validator of an option that takes one of a few numbers."""

    def check(number: int) -> int:
        if number not in numbers:
            raise ValueError(f"it must be one of {', '.join(map(str, numbers))}")
        return number

    return check
