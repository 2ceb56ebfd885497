"""Write what ONNX Runtime's CPU kernels run fastest.

Before:  i = MatMulInteger (q, w8, zp);  f = Cast <to=1> (i);  g = Mul (f, s);  …
         h = Add (x, y);  n = LayerNormalization (h, scale, bias);  …
         a = Reshape (q, {0,0,12,64});  b = Transpose <perm=[0,2,1,3]> (a);  …;  o = Attention (b, c, d, mask)
         p = Transpose <perm=[0,2,1,3]> (o);  r = Reshape (p, {0,0,768})
After:   g = com.microsoft.MatMulIntegerToFloat (q, w8, 1, s, zp);  …
         h = Sum (x, y);  n = LayerNormalization (h, scale, bias);  …
         r = Attention <q_num_heads=12, kv_num_heads=12> (q, k, v, mask)

Measured inside BERT-base at 1 x 128: the runtime fuses Add and LayerNormalization into SkipLayerNormalization, whose
kernel takes 0.28 ms where the two take 0.10 ms; it does not fuse a Sum. Attention that takes its operands as the
projections leave them saves four transpositions a layer, 2 % of MiniLM; with its cache inside, ten of 31 nodes a layer,
2 % of a step of Qwen2-0.5B in 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal, TuningQuery, admitted
from planish.optimizer.interfaces.quantization_pass import products_of
from planish.optimizer.ir.edit import add_initializer
from planish.optimizer.ir.graph import location_of, rank_of, sole_user
from planish.passes._flat_attention import flatten
from planish.passes.legalize._forms import ask_about_attention, ask_about_sums
from planish.passes.legalize._masks import AddedMasks, scale_rows

_CONTRIB = "com.microsoft"
_RANK = 4
_OFF = frozenset({"is_causal", "softcap", "qk_matmul_output_mode"})
"""Attributes of Attention whose value 0 is the default."""


@dataclass(frozen=True)
class LegalizeOnnxRuntime(Pass):
    """Rewrite canonical operators for ONNX Runtime on a CPU.

    1. An integer MatMul that is cast and scaled per column becomes MatMulIntegerToFloat.
    2. An Add of two tensors before a LayerNormalization becomes a Sum.
    3. An Attention between transpositions takes and gives (batch, sequence, hidden) itself, and concatenates new keys
       and values with its cache itself.
    4. If requested, such an Attention becomes the runtime's own MultiHeadAttention.

    The tuning table selects the options, at the sizes of the first attention and the first sum.
    """

    name: ClassVar[str] = "legalize-onnxruntime"

    keep_sums: bool = True
    """Case 2: keep additions and normalizations separate."""

    attention: Literal["standard", "multi-head"] = "standard"
    """Case 4: the operator for attention with equal query and key heads and without a cache."""

    def tuning_queries(self, model: ir.Model, sizes: Mapping[str, int]) -> Sequence[TuningQuery]:
        """Queries for both options, if the graph has the operators that they affect."""
        return [*ask_about_attention(model.graph, sizes), *ask_about_sums(model.graph, sizes)]

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph; integer MatMuls in subgraphs as well."""
        products = products_of(model, "MatMulInteger")
        sites = [site for node in products if (site := self._integer_product(model, node))]
        if self.keep_sums:
            sites += [location_of(node) for node in list(model.graph) if _keep_sum(node)]
        masks, refusals = AddedMasks(model.graph, "mask_for_multi_head"), []
        for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
            flat = flatten(model.graph, node)
            if isinstance(flat, Refusal):
                refusals.append(flat)
            elif flat is not None:
                sites.append(location_of(node))
                reason = _multi_head(model, flat, masks) if self.attention == "multi-head" else None
                refusals += [] if reason is None else [Refusal.at(flat, reason, flat.outputs[0])]
        return PassResult(model, bool(sites), sites=sites, refusals=refusals)

    def _integer_product(self, model: ir.Model, node: ir.Node) -> str | None:
        """Case 1: the location of the rewritten MatMul, or None."""
        cast, graph = sole_user(node.outputs[0]), node.graph
        scaling = sole_user(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
        if cast is None or scaling is None or scaling.op_type != "Mul" or len(node.inputs) < 3:
            return None
        scale = scaling.inputs[1] if scaling.inputs[0] is cast.outputs[0] else scaling.inputs[0]
        if cast.attributes.get_int("to", 0) != ir.DataType.FLOAT or {cast.graph, scaling.graph} != {graph}:
            return None
        weight = node.inputs[1]
        columns = None if weight is None or weight.shape is None else weight.shape[-1]
        if scale is None or rank_of(scale) != 1 or scale.const_value is None or graph is None:
            return None
        if scale.const_value.size not in (1, columns) or not admitted():
            return None
        location = location_of(node)
        fused = ir.node(
            "MatMulIntegerToFloat",
            [node.inputs[0], node.inputs[1], _one(model.graph), scale, node.inputs[2]],
            domain=_CONTRIB,
            name=f"{node.name}_to_float",
            metadata_props=dict(node.metadata_props),
        )
        _replace(graph, [node, cast, scaling], fused)
        model.opset_imports.setdefault(_CONTRIB, 1)
        return location


def _one(graph: ir.Graph) -> ir.Value:
    name = "int8_unit_scale"
    return (
        graph.initializers[name]
        if name in graph.initializers
        else add_initializer(graph, name, np.array(1, np.float32))
    )


def _replace(graph: ir.Graph | ir.Function, chain: list[ir.Node], fused: ir.Node) -> None:
    old, new = chain[-1].outputs[0], fused.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.insert_before(chain[0], fused)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    for node in reversed(chain):
        graph.remove(node, safe=True)
    old_name = old.name
    old.name = f"{old_name}_unfused"
    new.name = old_name


def _keep_sum(node: ir.Node) -> bool:
    """Case 2: turn the Add before this normalization into a Sum."""
    if node.op_type != "LayerNormalization" or node.domain != "" or node.inputs[0] is None:
        return False
    add = node.inputs[0].producer()
    if add is None or add.op_type != "Add" or add.domain != "" or not _tensors(add) or not admitted():
        return False
    # The runtime fuses an Add, but not a Sum, into SkipLayerNormalization (1.31), whose kernel is slower.
    add.op_type = "Sum"
    return True


def _tensors(add: ir.Node) -> bool:
    """True if both operands are activations of the same rank; the addition of a bias stays an Add."""
    return all(value is not None and value.const_value is None for value in add.inputs)


def _multi_head(model: ir.Model, node: ir.Node, masks: AddedMasks) -> str | None:
    """Case 4: replace a flat attention by MultiHeadAttention; returns the reason if that operator lacks a feature."""
    # A zero default is no use of a feature.
    attributes = {name: one for name, one in node.attributes.items() if name not in _OFF or one.value != 0}
    heads, groups = attributes.pop("q_num_heads"), attributes.pop("kv_num_heads")
    scale = attributes.pop("scale", None)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if attributes:
        return f"MultiHeadAttention has no {min(attributes)}"
    if len(node.outputs) > 1:
        return "it keeps its cache, which MultiHeadAttention has in another form"
    # The CPU kernel of MultiHeadAttention requires equal heads.
    if heads.as_int() != groups.as_int():
        return "its queries and keys differ in heads, which MultiHeadAttention does not know"
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs[:3]):
        return "its operands are not known to be of type FLOAT, as its mask would be"
    if mask is not None and (mask.shape is None or len(mask.shape) != _RANK):
        return "its mask is not known to have rank four"
    share = None if mask is None else masks.shares(mask, node)
    if share is not None and (mask is None or mask.shape is None or mask.shape[1] != 1):
        return "its mask is not one for all heads, and rows may see no key"
    added = [] if mask is None else [None, None, masks.added(mask, node)]
    scaled = {} if scale is None else {"scale": scale.as_float()}
    fused = ir.node(
        "MultiHeadAttention",
        [*node.inputs[:3], *added],
        {"num_heads": heads.as_int(), **scaled},
        domain=_CONTRIB,
        name=f"{node.name}_multi_head",
        metadata_props=dict(node.metadata_props),
    )
    _replace(model.graph, [node], fused)
    if share is not None:  # of (batch, 1, queries, 1), for (batch, queries, hidden)
        axis = ir.node("Constant", [], {"value": ir.tensor(np.array([1], np.int64))}, name=f"{fused.name}_heads")
        squeezed = ir.node("Squeeze", [share, axis.outputs[0]], name=f"{fused.name}_share")
        for new in (axis, squeezed):
            new.outputs[0].name = new.name
        squeezed.outputs[0].type = share.type
        model.graph.insert_before(fused, [axis, squeezed])
        scale_rows(model.graph, fused, squeezed.outputs[0])
    model.opset_imports.setdefault(_CONTRIB, 1)
    return None
