"""Even out the channels of an activation before it is rounded: what they differ by goes into the weights behind it.

Before:  y = LayerNormalization (x, g, b);      r = MatMul (y, w)
After:   y = LayerNormalization (x, g/s, b/s);  r = MatMul (y, s·w)         s: one number for each channel of y

1. y comes from a normalization that only such products read: s goes into its scale and bias.
2. y = a ⊙ u, and u (or u + a bias) is a product that only this reads: s goes into the columns of its matrix.
3. y comes from Attention without a cache, and only it reads its values, a product with as many heads: s goes there.
4. Anything else gets a Mul in front of the products, if that is asked for.

Products stay what they are up to rounding. Xiao et al. 2023, "SmoothQuant", section 4; for scales that are searched,
Lin et al. 2024, "AWQ: Activation-aware Weight Quantization", section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Le
from pydantic import AfterValidator

from planish.optimizer.interfaces.observers import ChannelObserver, GramObserver, statistic_of
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, StatisticRequest, admitted
from planish.optimizer.interfaces.quantization_pass import (
    MatMulSite,
    matrix_behind,
    one_of,
    refusals_in_subgraphs,
    sites_by_data,
)
from planish.optimizer.ir.edit import add_initializer, copy_location
from planish.optimizer.ir.graph import is_constant_vector, location_of, rank_of, sizes_of, sole_user, vector_operand
from planish.passes.quantization._operands import change_operand
from planish.passes.quantization._ranges import expected_error
from planish.passes.quantization._rounding import blocks_of

_NORMS = ("LayerNormalization", "RMSNormalization")
_RATIOS = np.linspace(0, 1, 21)
"""Exponents that are tried."""
_WORTH = 0.8
"""Share of the error that must be left at most for a Mul, or another matrix, to be worth it."""


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Scale each activation that products with constant matrices read, and the rows of these matrices inversely."""

    name: ClassVar[str] = "smooth-activations"

    method: Literal["fit", "balance", "search"] = "fit"
    """`balance` lets activations and weights share the difference (SmoothQuant); `fit` does so too, and finds for each
    activation the strength that should leave the least error once both have 8 bits; `search` takes the power of the
    channels' mean magnitude that leaves the least error once weights alone are rounded, in blocks (AWQ)."""

    strength: Annotated[float, Ge(0), Le(1)] = 0.5
    """For `balance`: how much of the difference goes into the weights; 0 nothing, 1 all of it."""

    bits: Annotated[int, AfterValidator(one_of(4, 8))] = 4
    """For `search`: the bits that weights will have."""

    block: Annotated[int, AfterValidator(one_of(16, 32, 64, 128, 256))] = 32
    """For `search`: the entries of a column that will share a scale."""

    anywhere: bool = False
    """Whether a Mul is written where no operator in front of the products takes the scale in."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """Each channel's magnitudes, and for a search what the error depends on."""
        kinds = (ChannelObserver, GramObserver) if self.method == "search" else (ChannelObserver,)
        return [StatisticRequest(sites[0].data, kind) for sites in sites_by_data(model) for kind in kinds]

    def consume(self, model: ir.Model) -> None:
        """Search scales as soon as what they depend on was seen."""
        for sites in sites_by_data(model) if self.method == "search" else ():
            data = sites[0].data
            gram = statistic_of(data, GramObserver)
            if gram is not None and self._obstacle(sites) is None:
                data.meta[self._key] = self._searched(sites, gram.mean)

    @property
    def _key(self) -> str:
        return f"scale of {self}"

    def call(self, model: ir.Model) -> PassResult:
        """Scale what can be scaled in the main graph."""
        result = PassResult(model, modified=False, refusals=refusals_in_subgraphs(model))
        for sites in sites_by_data(model):
            reason = self._obstacle(sites)
            if reason is not None:
                result.refusals.append(Refusal.at(sites[0].node, reason, sites[0].data))
            elif admitted():
                result.sites.append(location_of(sites[0].node))
                self._rewrite(model.graph, sites)
        result.modified = bool(result.sites)
        return result

    def _obstacle(self, sites: Sequence[MatMulSite]) -> str | None:
        """Why an activation stays as it is."""
        channels = statistic_of(sites[0].data, ChannelObserver)
        if channels is None:
            return "nothing was seen of its activation: scales need calibration data"
        if not np.isfinite(channels.largest).all():
            return "its activation holds NaN or infinity"
        if self.method == "search" and any(sizes_of(site.tensor)[0] % self.block for site in sites):
            return f"the rows of a matrix are no multiple of a block of {self.block}"
        if any(len(list(site.weight.uses())) > 1 or site.weight.is_graph_output() for site in sites):
            return "a matrix is read by something else as well"
        if not self.anywhere and _taker(sites) is None:
            return "nothing in front of its products can take a scale in"
        return "its channels are even enough" if self.method == "fit" and self._scale(sites) is None else None

    def _rewrite(self, graph: ir.Graph, sites: Sequence[MatMulSite]) -> None:
        scale, taker = self._scale(sites), _taker(sites)
        if scale is None:
            return
        if taker is None:
            _insert(graph, sites, scale)
        else:
            for node, index in taker:
                change_operand(graph, node, index, "smooth", functools.partial(np.multiply, 1 / scale))
        for site in sites:
            change_operand(graph, site.node, 1, "smooth", functools.partial(np.multiply, scale[:, None]))

    def _scale(self, sites: Sequence[MatMulSite]) -> np.ndarray | None:
        """One number for each channel, which the weights are multiplied by; None if nothing is to be won."""
        if self.method == "search":
            return cast("np.ndarray", sites[0].data.meta[self._key])
        channels, matrices = _channels(sites), [site.tensor.numpy() for site in sites]
        rows = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)
        if self.method == "balance":
            return _balanced(channels.largest, rows, self.strength)
        return _fitted(channels, rows, matrices)

    def _searched(self, sites: Sequence[MatMulSite], gram: np.ndarray) -> np.ndarray:
        """The scale with the least error of the products."""
        magnitude, matrices = _channels(sites).magnitude, [site.tensor.numpy() for site in sites]
        tried = [_balanced(magnitude, np.ones_like(magnitude), ratio) for ratio in _RATIOS]
        return min(tried, key=lambda scale: sum(self._error(matrix, scale, gram) for matrix in matrices))

    def _error(self, matrix: np.ndarray, scale: np.ndarray, gram: np.ndarray) -> float:
        """Squared error of the products if the scaled matrix is rounded."""
        scaled = matrix * scale[:, None]
        rounded = blocks_of(scaled, self.bits, self.block, symmetric=True, method="nearest").restored(scaled)
        error = rounded / scale[:, None] - matrix
        return float((error * (gram @ error)).sum())


def _channels(sites: Sequence[MatMulSite]) -> ChannelObserver:
    """What was seen of each channel of the activation that products read."""
    channels = statistic_of(sites[0].data, ChannelObserver)
    if channels is None:
        raise ValueError(f"{sites[0].data.name!r} was not seen")
    return channels


def _fitted(channels: ChannelObserver, rows: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray | None:
    """The scale of the strength that should leave the least error in 8 bits; None if it is little better than none."""
    tried = [_balanced(channels.largest, rows, strength) for strength in _RATIOS]
    best = min(tried, key=lambda scale: expected_error(channels, scale, matrices))
    plain = expected_error(channels, np.ones_like(best), matrices)
    return best if expected_error(channels, best, matrices) < _WORTH * plain else None


def _balanced(activation: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """activationˢ / weights¹⁻ˢ, around one; one for a channel that is never used."""
    used = (activation > 0) & (weights > 0)
    if not used.any():
        return np.ones_like(activation)
    logs = strength * np.log(activation, where=used, out=np.zeros_like(activation))
    logs -= (1 - strength) * np.log(weights, where=used, out=np.zeros_like(activation))
    logs -= (logs[used].max() + logs[used].min()) / 2
    return np.where(used, np.exp(logs), 1).astype(np.float32)


Operands = list[tuple[ir.Node, int]]
"""Constants whose last axis has the channels: the node that reads each, and as which input."""


def _taker(sites: Sequence[MatMulSite]) -> Operands | None:
    """What in front of the products can take a scale in; nothing if nothing can."""
    data = sites[0].data
    node = data.producer()
    if node is None or data.is_graph_output() or {use.node for use in data.uses()} != {site.node for site in sites}:
        return None
    width = sizes_of(sites[0].tensor)[0]
    if node.op_type in _NORMS:
        constants = [index for index, value in enumerate(node.inputs) if index and value is not None]
        plain = all(is_constant_vector(node.inputs[index], width) for index in constants)
        return [(node, index) for index in constants] if plain else None
    if node.op_type == "Mul":
        vector = vector_operand(node, width)
        products = (found for value in node.inputs if (found := _product(value, width)) is not None)
        return next(products, None) if vector is None else [(node, vector)]
    if node.op_type == "Attention" and rank_of(data) == 3 and data is node.outputs[0] and not _caches(node):
        heads = {node.attributes[key].as_int() for key in ("q_num_heads", "kv_num_heads") if key in node.attributes}
        return _product(node.inputs[2], width) if len(heads) == 1 else None
    return None


def _caches(attention: ir.Node) -> bool:
    """Whether values come from a cache, or go into one: they are not to be scaled."""
    return any(value is not None for value in attention.inputs[4:]) or any(
        value.uses() or value.is_graph_output() for value in attention.outputs[1:]
    )


def _product(value: ir.Value | None, width: int) -> Operands | None:
    """The matrix of a product, and the bias behind it, whose columns only become the channels of ``value``."""
    node = None if value is None or sole_user(value) is None else value.producer()
    if node is not None and node.op_type == "Add":
        bias = vector_operand(node, width)
        inner = None if bias is None else _product(node.inputs[1 - bias], width)
        return None if inner is None or bias is None else [*inner, (node, bias)]
    weight = node.inputs[1] if node is not None and node.op_type == "MatMul" and node.domain == "" else None
    tensor = matrix_behind(weight)
    if node is None or weight is None or tensor is None or len(list(weight.uses())) > 1:
        return None
    return [(node, 1)] if tensor.dtype is ir.DataType.FLOAT and sizes_of(tensor)[1] == width else None


def _insert(graph: ir.Graph, sites: Sequence[MatMulSite], scale: np.ndarray) -> None:
    """A Mul between the activation and its products."""
    data, first = sites[0].data, sites[0].node
    factor = add_initializer(graph, f"{data.name}_smooth_scale", 1 / scale)
    node = ir.node("Mul", [data, factor], name=f"{data.name}_smooth")
    copy_location(first, node)
    smooth = node.outputs[0]
    smooth.name, smooth.shape, smooth.type = f"{data.name}_smoothed", data.shape, data.type
    graph.insert_before(first, node)
    for site in sites:
        site.node.replace_input_with(0, smooth)
