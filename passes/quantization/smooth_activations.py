"""Scale the channels of an activation to similar magnitudes, and the rows of the weights that read it inversely.

Before:  y = LayerNormalization (x, g, b);      r = MatMul (y, w)
After:   y = LayerNormalization (x, g/s, b/s);  r = MatMul (y, s·w)         s: one number for each channel of y

1. y is the output of a normalization that only such MatMuls read: its scale and bias are divided by s.
2. y = a ⊙ u, and u (or u + a bias) is a MatMul that only this reads: the columns of its matrix are divided by s.
3. y is the output of Attention without a cache, whose values are a MatMul with as many heads that only it reads: the
   columns of that matrix are divided by s.
4. Anything else gets a Mul in front of the MatMuls, if that is asked for.

Results change by rounding alone. Xiao et al. 2023, "SmoothQuant", section 4; for scales that are searched,
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

from planish.optimizer.interfaces.observers import ChannelObserver, GramObserver, statistic_of, unusable_statistic
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
from planish.passes.quantization._blocks import BlockFormat
from planish.passes.quantization._expected_error import expected_error
from planish.passes.quantization._operands import change_operand
from planish.passes.quantization.methods.nearest import Nearest

_NORMS = ("LayerNormalization", "RMSNormalization")
_RATIOS = np.linspace(0, 1, 21)
"""Exponents that a search tries."""
_WORTH = 0.8
"""Largest share of the error that may be left, for a Mul, or another matrix, to be worth it."""


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Scale each activation that MatMuls with constant matrices read, and the rows of these matrices inversely."""

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
    """Insert a Mul where no operator in front of the MatMuls can be scaled."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """Magnitudes of each channel, and for a search the Gram matrix, on which the error depends."""
        kinds = (ChannelObserver, GramObserver) if self.method == "search" else (ChannelObserver,)
        return [StatisticRequest(sites[0].data, kind) for sites in sites_by_data(model) for kind in kinds]

    def consume(self, model: ir.Model) -> None:
        """Search the scales of activations whose statistics are there."""
        for sites in sites_by_data(model) if self.method == "search" else ():
            data = sites[0].data
            gram = statistic_of(data, GramObserver)
            # The scale is kept instead of the Gram matrix, which is dropped right after this call.
            if gram is not None and self._not_scaled(sites) is None:
                data.meta[self._key] = self._search(sites, gram.mean)

    @property
    def _key(self) -> str:
        return f"scale of {self}"

    def call(self, model: ir.Model) -> PassResult:
        """Scale the activations of the main graph where that is possible."""
        result = PassResult(model, modified=False, refusals=refusals_in_subgraphs(model))
        for sites in sites_by_data(model):
            reason = self._not_scaled(sites)
            if reason is not None:
                result.refusals.append(Refusal.at(sites[0].node, reason, sites[0].data))
            elif admitted():
                result.sites.append(location_of(sites[0].node))
                self._rewrite(model.graph, sites)
        result.modified = bool(result.sites)
        return result

    def _not_scaled(self, sites: Sequence[MatMulSite]) -> str | None:
        """Reason why an activation is not scaled; None if it is."""
        unusable = unusable_statistic(sites[0].data, ChannelObserver, "scales need")
        if unusable is not None:
            return unusable
        if self.method == "search" and any(sizes_of(site.tensor)[0] % self.block for site in sites):
            return f"the rows of a matrix are no multiple of a block of {self.block}"
        if any(len(list(site.weight.uses())) > 1 or site.weight.is_graph_output() for site in sites):
            return "a matrix is read by something else as well"
        if not self.anywhere and _scalable_operands(sites) is None:
            return "nothing in front of its products can take a scale in"
        return "its channels are even enough" if self.method == "fit" and self._scale(sites) is None else None

    def _rewrite(self, graph: ir.Graph, sites: Sequence[MatMulSite]) -> None:
        scale, operands = self._scale(sites), _scalable_operands(sites)
        if scale is None:
            return
        if operands is None:
            _insert_mul(graph, sites, scale)
        else:
            for node, index in operands:
                change_operand(graph, node, index, "smooth", functools.partial(np.multiply, 1 / scale))
        for site in sites:
            change_operand(graph, site.node, 1, "smooth", functools.partial(np.multiply, scale[:, None]))

    def _scale(self, sites: Sequence[MatMulSite]) -> np.ndarray | None:
        """Factor of the weights for each channel; None if scaling hardly lowers the error."""
        if self.method == "search":
            return cast("np.ndarray", sites[0].data.meta[self._key])
        channels, matrices = _channels(sites), [site.tensor.numpy() for site in sites]
        rows = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)
        if self.method == "balance":
            return _balance(channels.largest, rows, self.strength)
        return _fit_strength(channels, rows, matrices)

    def _search(self, sites: Sequence[MatMulSite], gram: np.ndarray) -> np.ndarray:
        """The scale with the least error of the results."""
        magnitude, matrices = _channels(sites).magnitude, [site.tensor.numpy() for site in sites]
        scales = [_balance(magnitude, np.ones_like(magnitude), ratio) for ratio in _RATIOS]
        return min(scales, key=lambda scale: sum(self._error(matrix, scale, gram) for matrix in matrices))

    def _error(self, matrix: np.ndarray, scale: np.ndarray, gram: np.ndarray) -> float:
        """Squared error of the results if the scaled matrix is quantized."""
        scaled = matrix * scale[:, None]
        # AWQ searches with rounding to nearest, too; a search of ranges inside would run 21 times for each matrix.
        blocks = Nearest(BlockFormat(self.bits, self.block, symmetric=True)).fit(scaled)
        error = blocks.dequantized(scaled) / scale[:, None] - matrix
        return float((error * (gram @ error)).sum())


def _channels(sites: Sequence[MatMulSite]) -> ChannelObserver:
    """Statistics of each channel of the activation that these sites read."""
    channels = statistic_of(sites[0].data, ChannelObserver)
    if channels is None:
        raise ValueError(f"{sites[0].data.name!r} has no channel statistics")
    return channels


def _fit_strength(channels: ChannelObserver, rows: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray | None:
    """The scale with the least expected error in 8 bits; None if it is little better than no scale."""
    scales = [_balance(channels.largest, rows, strength) for strength in _RATIOS]
    best = min(scales, key=lambda scale: expected_error(channels, scale, matrices))
    unscaled = expected_error(channels, np.ones_like(best), matrices)
    return best if expected_error(channels, best, matrices) < _WORTH * unscaled else None


def _balance(activation: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """activationˢ / weights¹⁻ˢ, around one; one for a channel that is always zero."""
    used = (activation > 0) & (weights > 0)
    if not used.any():
        return np.ones_like(activation)
    logs = strength * np.log(activation, where=used, out=np.zeros_like(activation))
    logs -= (1 - strength) * np.log(weights, where=used, out=np.zeros_like(activation))
    # Only ratios matter. Centered, neither the scale nor its inverse leaves the range of float16 without need.
    logs -= (logs[used].max() + logs[used].min()) / 2
    return np.where(used, np.exp(logs), 1).astype(np.float32)


Operands = list[tuple[ir.Node, int]]
"""Constants whose last axis has the channels: the node that reads each, and the index of the operand."""


def _scalable_operands(sites: Sequence[MatMulSite]) -> Operands | None:
    """Constants in front of the MatMuls that can be scaled instead of the activation; None if there are none."""
    data = sites[0].data
    node = data.producer()
    # A scaled activation is wrong for every other reader.
    if node is None or data.is_graph_output() or {use.node for use in data.uses()} != {site.node for site in sites}:
        return None
    width = sizes_of(sites[0].tensor)[0]
    if node.op_type in _NORMS:
        constants = [index for index, value in enumerate(node.inputs) if index and value is not None]
        scalable = all(is_constant_vector(node.inputs[index], width) for index in constants)
        return [(node, index) for index in constants] if scalable else None
    if node.op_type == "Mul":
        vector = vector_operand(node, width)
        operands = (_matmul_operands(value, width) for value in node.inputs)
        return next(filter(None, operands), None) if vector is None else [(node, vector)]
    if node.op_type == "Attention" and rank_of(data) == 3 and data is node.outputs[0] and not _has_cache(node):
        heads = {node.attributes[key].as_int() for key in ("q_num_heads", "kv_num_heads") if key in node.attributes}
        # With fewer heads of values than of queries, several channels of the result share one channel of the values.
        return _matmul_operands(node.inputs[2], width) if len(heads) == 1 else None
    return None


def _has_cache(attention: ir.Node) -> bool:
    """True if values come from a cache, or go into one: cached values must not be scaled."""
    return any(value is not None for value in attention.inputs[4:]) or any(
        value.uses() or value.is_graph_output() for value in attention.outputs[1:]
    )


def _matmul_operands(value: ir.Value | None, width: int) -> Operands | None:
    """The matrix, and the bias, of a MatMul that gives ``value``; None if anything else depends on them."""
    node = None if value is None or sole_user(value) is None else value.producer()
    if node is not None and node.op_type == "Add":
        bias = vector_operand(node, width)
        matrix = None if bias is None else _matmul_operands(node.inputs[1 - bias], width)
        return None if matrix is None or bias is None else [*matrix, (node, bias)]
    weight = node.inputs[1] if node is not None and node.op_type == "MatMul" and node.domain == "" else None
    tensor = matrix_behind(weight)
    if node is None or weight is None or tensor is None or len(list(weight.uses())) > 1:
        return None
    return [(node, 1)] if tensor.dtype is ir.DataType.FLOAT and sizes_of(tensor)[1] == width else None


def _insert_mul(graph: ir.Graph, sites: Sequence[MatMulSite], scale: np.ndarray) -> None:
    """Insert a Mul between the activation and its MatMuls."""
    data, first = sites[0].data, sites[0].node
    factor = add_initializer(graph, f"{data.name}_smooth_scale", 1 / scale)
    node = ir.node("Mul", [data, factor], name=f"{data.name}_smooth")
    copy_location(first, node)
    smooth = node.outputs[0]
    smooth.name, smooth.shape, smooth.type = f"{data.name}_smoothed", data.shape, data.type
    graph.insert_before(first, node)
    for site in sites:
        site.node.replace_input_with(0, smooth)
