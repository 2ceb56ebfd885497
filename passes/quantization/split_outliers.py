"""Multiply the outlier channels of an activation in float, so that the other channels get a small step.

Before:  r = MatMul (x, w)
After:   y = Mul (x, m);  p = MatMul (y, m·w);  o = Gather <axis=-1> (x, k);  q = MatMul (o, w[k]);  r = Add (p, q)

k are the outlier channels; m is 0 for them and 1 for all others. Results change by rounding alone; later passes
quantize p. Dettmers et al. 2022, "LLM.int8()", section 3.2, choose channels anew for each input; here calibration data
choose them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Gt, Lt

from planish.optimizer.interfaces.observers import ChannelObserver, statistic_of, unusable_statistic
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, StatisticRequest, admitted
from planish.optimizer.interfaces.quantization_pass import MatMulSite, refusals_in_subgraphs, sites_by_data
from planish.optimizer.ir.edit import add_initializer, copy_location, rename_duplicates, replace_value
from planish.optimizer.ir.graph import IN_FLOAT, location_of, sizes_of
from planish.passes.quantization._expected_error import expected_error
from planish.passes.quantization._operands import change_operand


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Split the outlier channels from each activation of MatMuls with constant matrices."""

    name: ClassVar[str] = "split-outliers"

    channels: Annotated[int, Ge(1)] = 16
    """Outlier channels of an activation."""

    gain: Annotated[float, Gt(0), Lt(1)] = 0.4
    """Largest share of the expected error in 8 bits that may be left, for the second MatMul to be worth its time."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """Extremes of each channel."""
        return [StatisticRequest(sites[0].data, ChannelObserver) for sites in sites_by_data(model)]

    def call(self, model: ir.Model) -> PassResult:
        """Split activations of the main graph where that pays."""
        result = PassResult(model, modified=False, refusals=refusals_in_subgraphs(model))
        for sites in sites_by_data(model):
            channels = statistic_of(sites[0].data, ChannelObserver)
            reason = self._not_split(sites, channels)
            if channels is None or reason is not None:
                result.refusals.append(Refusal.at(sites[0].node, reason or "", sites[0].data))
            elif admitted():
                result.sites.append(location_of(sites[0].node))
                _split(model.graph, sites, self._outliers(channels))
        result.modified = bool(result.sites)
        if result.modified:
            # The result of one MatMul and the activation of the next are named by the same rule.
            rename_duplicates(model.graph)
        return result

    def _not_split(self, sites: Sequence[MatMulSite], channels: ChannelObserver | None) -> str | None:
        """Reason why an activation stays whole; None if it is split."""
        unusable = unusable_statistic(sites[0].data, ChannelObserver, "outliers need")
        if channels is None or unusable is not None:
            return unusable
        if len(channels.largest) < 8 * self.channels:
            return f"it has {len(channels.largest)} channels only"
        matrices = [site.tensor.numpy() for site in sites]
        kept = np.ones_like(channels.largest)
        whole = expected_error(channels, kept, matrices)
        kept[self._outliers(channels)] = 0
        rest = expected_error(channels, kept, [matrix * kept[:, None] for matrix in matrices])
        return None if rest <= self.gain * whole else "no channels stand out"

    def _outliers(self, channels: ChannelObserver) -> np.ndarray:
        return np.sort(np.argsort(-channels.largest, kind="stable")[: self.channels])


def _split(graph: ir.Graph, sites: Sequence[MatMulSite], outliers: np.ndarray) -> None:
    """Write both MatMuls of each site, with one selection of channels for all."""
    data, first = sites[0].data, sites[0].node
    name = data.name or ""
    mask = np.ones(sizes_of(sites[0].tensor)[0], np.float32)
    mask[outliers] = 0
    ordinary = ir.node("Mul", [data, add_initializer(graph, f"{name}_ordinary", mask)], name=f"{name}_split")
    index = add_initializer(graph, f"{name}_outliers", outliers.astype(np.int64))
    selected = ir.node("Gather", [data, index], {"axis": -1}, name=f"{name}_choose")
    for node, suffix, width in ((ordinary, "rest", None), (selected, "chosen", len(outliers))):
        _insert(graph, first, node, f"{name}_{suffix}")
        value = node.outputs[0]
        value.type = data.type
        value.shape = data.shape if width is None or data.shape is None else ir.Shape([*data.shape[:-1], width])
    for site in sites:
        rows = np.ascontiguousarray(site.tensor.numpy()[outliers])
        weight = add_initializer(graph, f"{site.name}_outlier_rows", rows)
        old = site.node.outputs[0]
        in_float = ir.node("MatMul", [selected.outputs[0], weight], name=f"{site.name}_outliers")
        # Marked: quantization passes must leave this MatMul in float.
        in_float.metadata_props[IN_FLOAT] = "1"
        total = ir.node("Add", [old, in_float.outputs[0]], name=f"{site.name}_joined")
        _insert(graph, site.node, in_float, f"{old.name}_outliers")
        in_float.outputs[0].shape, in_float.outputs[0].type = old.shape, old.type
        # The sum takes the statistics of the old value over: the next MatMul may read it.
        replace_value(old, total.outputs[0], "rest")
        # replace_value also made the Add read its own result.
        total.replace_input_with(0, old)
        site.node.replace_input_with(0, ordinary.outputs[0])
        change_operand(graph, site.node, 1, "rest", functools.partial(np.multiply, mask[:, None]))
        copy_location(site.node, total)
        graph.insert_after(site.node, total)


def _insert(graph: ir.Graph, before: ir.Node, node: ir.Node, name: str) -> None:
    node.outputs[0].name = name
    copy_location(before, node)
    graph.insert_before(before, node)
