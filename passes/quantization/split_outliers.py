"""Multiply the few channels that stand out in float, so that the rest has small steps.

Before:  r = MatMul (x, w)
After:   y = Mul (x, m);  p = MatMul (y, m·w);  o = Gather <axis=-1> (x, k);  q = MatMul (o, w[k]);  r = Add (p, q)

k are the channels that stand out and m is 0 for them, 1 for all others. Products are what they were up to rounding;
what is rounded afterwards is p. Dettmers et al. 2022, "LLM.int8()", section 3.2, choose channels anew for each input;
here they are those that stood out over calibration data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Gt, Lt

from planish.optimizer.interfaces.observers import ChannelObserver, statistic_of
from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, StatisticRequest, admitted
from planish.optimizer.interfaces.quantization_pass import MatMulSite, refusals_in_subgraphs, sites_by_data
from planish.optimizer.ir.edit import add_initializer, copy_location, rename_duplicates, replace_value
from planish.optimizer.ir.graph import IN_FLOAT, location_of, sizes_of
from planish.passes.quantization._operands import change_operand
from planish.passes.quantization._ranges import expected_error


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Take the channels that stand out from each activation of products with constant matrices."""

    name: ClassVar[str] = "split-outliers"

    channels: Annotated[int, Ge(1)] = 16
    """How many are taken out at once."""

    gain: Annotated[float, Gt(0), Lt(1)] = 0.4
    """Share of the expected error in 8 bits that must be left at most, for the second product to be worth it."""

    def statistics(self, model: ir.Model) -> Sequence[StatisticRequest]:
        """Each channel's extremes."""
        return [StatisticRequest(sites[0].data, ChannelObserver) for sites in sites_by_data(model)]

    def call(self, model: ir.Model) -> PassResult:
        """Split what is worth it in the main graph."""
        result = PassResult(model, modified=False, refusals=refusals_in_subgraphs(model))
        for sites in sites_by_data(model):
            channels = statistic_of(sites[0].data, ChannelObserver)
            reason = self._obstacle(sites, channels)
            if channels is None or reason is not None:
                result.refusals.append(Refusal.at(sites[0].node, reason or "", sites[0].data))
            elif admitted():
                result.sites.append(location_of(sites[0].node))
                _split(model.graph, sites, self._outliers(channels))
        result.modified = bool(result.sites)
        if result.modified:
            rename_duplicates(model.graph)  # a product's result and what reads it get names of one form
        return result

    def _obstacle(self, sites: Sequence[MatMulSite], channels: ChannelObserver | None) -> str | None:
        """Why an activation stays whole."""
        if channels is None:
            return "nothing was seen of its activation: outliers need calibration data"
        if not np.isfinite(channels.largest).all():
            return "its activation holds NaN or infinity"
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
    """Write both products of each site, with one selection of channels for all."""
    data, first = sites[0].data, sites[0].node
    name = data.name or ""
    mask = np.ones(sizes_of(sites[0].tensor)[0], np.float32)
    mask[outliers] = 0
    ordinary = ir.node("Mul", [data, add_initializer(graph, f"{name}_ordinary", mask)], name=f"{name}_split")
    index = add_initializer(graph, f"{name}_outliers", outliers.astype(np.int64))
    chosen = ir.node("Gather", [data, index], {"axis": -1}, name=f"{name}_choose")
    for node, suffix, width in ((ordinary, "rest", None), (chosen, "chosen", len(outliers))):
        _place(graph, first, node, f"{name}_{suffix}")
        value = node.outputs[0]
        value.type = data.type
        value.shape = data.shape if width is None or data.shape is None else ir.Shape([*data.shape[:-1], width])
    for site in sites:
        rows = np.ascontiguousarray(site.tensor.numpy()[outliers])
        weight = add_initializer(graph, f"{site.name}_outlier_rows", rows)
        old = site.node.outputs[0]
        apart = ir.node("MatMul", [chosen.outputs[0], weight], name=f"{site.name}_outliers")
        apart.metadata_props[IN_FLOAT] = "1"
        total = ir.node("Add", [old, apart.outputs[0]], name=f"{site.name}_joined")
        _place(graph, site.node, apart, f"{old.name}_outliers")
        apart.outputs[0].shape, apart.outputs[0].type = old.shape, old.type
        replace_value(old, total.outputs[0], "rest")  # with what was observed: the next product may read it
        total.replace_input_with(0, old)
        site.node.replace_input_with(0, ordinary.outputs[0])
        change_operand(graph, site.node, 1, "rest", functools.partial(np.multiply, mask[:, None]))
        copy_location(site.node, total)
        graph.insert_after(site.node, total)


def _place(graph: ir.Graph, before: ir.Node, node: ir.Node, name: str) -> None:
    node.outputs[0].name = name
    copy_location(before, node)
    graph.insert_before(before, node)
