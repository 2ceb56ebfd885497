"""What all quantizing passes share: the products they are about, and which of them stay in float."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer.base import Pass, PassResult, Refusal, Wish, admitted
from planish.optimizer.graph import (
    IN_FLOAT,
    add_initializer,
    constant_of,
    forget_unread,
    is_weight_matrix,
    location_of,
    sizes_of,
    sole_user,
    vector_operand,
)
from planish.optimizer.observations import Channels, seen


@dataclass(frozen=True)
class Site:
    """A product with a constant matrix."""

    node: ir.Node
    data: ir.Value
    weight: ir.Value
    tensor: ir.TensorProtocol

    @property
    def name(self) -> str:
        """How options and the lock call it: by its product, whose name stays the same."""
        return _name_of(self.node)


@dataclass(frozen=True)
class Quantizing(Pass):
    """Rounds the matrices of products; each product is a site that may be skipped by name."""

    exact: ClassVar[bool] = False

    minimum: Annotated[int, Ge(0)] = 4096
    """Elements that a matrix must have to be worth it."""

    skip: tuple[str, ...] = ()
    """Names of products that stay in float: those that would cost the most accuracy."""

    correct_bias: bool = False
    """Whether the mean error of each product's rounded matrix, over calibration data, is taken out of the bias behind
    it (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2)."""

    def wishes(self, model: ir.Model) -> Sequence[Wish]:
        """The mean of each channel, if biases are corrected."""
        corrected = [site for site in self.candidates(model) if _bias_of(site)] if self.correct_bias else []
        return [Wish(site.data, Channels) for site in corrected]

    def obstacle(self, site: Site) -> str | None:
        """Why this form cannot say this matrix; nothing if it can."""
        return None

    def unready(self, site: Site) -> str | None:
        """Why a product that could be rounded cannot be rounded now; nothing if it can."""
        return None

    @abc.abstractmethod
    def rounded(self, site: Site) -> np.ndarray:
        """The matrix of a site as its product will see it, float32, shape as given."""

    def heard(self, site: Site, data: np.ndarray) -> np.ndarray:
        """An activation as a product will see it; as it is, unless the form rounds it."""
        return data

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, sites: list[Site]) -> None:
        """Write all of these in few bits."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every such MatMul of the main graph."""
        result = PassResult(model, modified=False)
        taken: list[Site] = []
        products = products_of(model)
        unknown = set(self.skip) - {_name_of(node) for node in products}
        result.refusals += [
            Refusal(name, "it is to be skipped, and there is no such product") for name in sorted(unknown)
        ]
        for node in products:
            site = site_of(node)
            reason = "its right operand is not a constant matrix" if site is None else self._reason(site)
            if site is None or reason is not None:
                result.refusals.append(Refusal.at(node, reason or "", node.inputs[1]))
            elif admitted():
                result.sites.append(location_of(node))
                taken.append(site)
        corrected = [self._correct(model.graph, site) for site in taken] if self.correct_bias else []
        if taken:
            self.rewrite(model, taken)
            forget_unread(model.graph, model.graph.initializers.values())
        result.modified = bool(taken)
        result.facts["quantized"] = len(taken)
        if self.correct_bias:
            result.facts["corrected"] = sum(corrected)
        return result

    def candidates(self, model: ir.Model) -> list[Site]:
        """Products that can be rounded, those that are skipped among them."""
        return [s for s in map(site_of, products_of(model)) if s is not None and self._misfit(s) is None]

    def _correct(self, graph: ir.Graph, site: Site) -> bool:
        """Add the mean of what rounding takes away to the bias behind a product; False if there is none."""
        place, channels = _bias_of(site), seen(site.data, Channels)
        if place is None or channels is None:
            return False
        node, index = place
        bias = constant_of(node.inputs[index])
        if bias is None:
            return False
        corrected = bias + channels.mean @ (site.tensor.numpy() - self.rounded(site))
        node.replace_input_with(index, add_initializer(graph, f"{site.name}_corrected", corrected.astype(np.float32)))
        return True

    def _reason(self, site: Site) -> str | None:
        """Why this product stays in float."""
        if site.name in self.skip:
            return "it is skipped, as the pass was asked to"
        return self._misfit(site) or self.unready(site)

    def _misfit(self, site: Site) -> str | None:
        """Why this matrix cannot be rounded, or is not worth it."""
        if IN_FLOAT in site.node.metadata_props:
            return "it multiplies the channels that stand out"
        if site.tensor.dtype is not ir.DataType.FLOAT:
            return f"its matrix is {site.tensor.dtype}, not FLOAT"
        if site.tensor.size < self.minimum:
            return f"its matrix has {site.tensor.size} elements, fewer than {self.minimum}"
        if not _finite(site):
            return "its matrix holds NaN or infinity"
        return self.obstacle(site)


def _name_of(product: ir.Node) -> str:
    return product.name or product.outputs[0].name or ""


def products_of(model: ir.Model) -> list[ir.Node]:
    """Every product of the main graph."""
    return [node for node in model.graph if node.op_type == "MatMul" and node.domain == ""]


def site_of(node: ir.Node) -> Site | None:
    """The product with a constant matrix that a MatMul is, if it is one."""
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or not is_weight_matrix(weight) or weight.const_value is None:
        return None
    return Site(node, data, weight, weight.const_value)


def sites_by_data(model: ir.Model) -> list[list[Site]]:
    """Products with constant float matrices by the activation that they read."""
    found: dict[int, list[Site]] = {}
    for site in filter(None, map(site_of, products_of(model))):
        if IN_FLOAT not in site.node.metadata_props and site.tensor.dtype is ir.DataType.FLOAT:
            found.setdefault(id(site.data), []).append(site)
    return list(found.values())


def _finite(site: Site) -> bool:
    """Whether all entries of a matrix are numbers; it is read once for all who ask."""
    if "finite" not in site.tensor.meta:
        site.tensor.meta["finite"] = bool(np.isfinite(site.tensor.numpy()).all())
    return bool(site.tensor.meta["finite"])


def _bias_of(site: Site) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector that alone reads a product, and which of its inputs that is."""
    node = sole_user(site.node.outputs[0])
    if node is None or node.op_type != "Add" or node.domain != "":
        return None
    index = vector_operand(node, sizes_of(site.tensor)[1])
    return None if index is None else (node, index)


def one_of(*numbers: int) -> Callable[[int], int]:
    """A check of an option that takes a few numbers."""

    def check(number: int) -> int:
        if number not in numbers:
            raise ValueError(f"it must be one of {', '.join(map(str, numbers))}")
        return number

    return check
