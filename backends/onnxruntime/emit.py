"""Changes of a graph that ONNX Runtime's loaders need."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.edit import add_initializer
from planish.optimizer.ir.program import Role, guess_role


def open_cache_sizes(model: ir.Model) -> ir.Model:
    """A copy whose cache inputs leave heads and their size open.

    Loaders of the ecosystem make the empty cache of the first step from what config.json says of other layers, and get
    it wrong for grouped heads or heads of another size; what is empty does no harm, a fixed shape would refuse it. A
    Concat passes over what is empty. An Attention that keeps its cache inside does not, so it reads the cache behind a
    Reshape, which the runtime runs without a copy.
    """
    copy = model.clone()
    for value in copy.graph.inputs:
        if guess_role(value.name or "", value.dtype or ir.DataType.FLOAT) is not Role.CACHE or value.shape is None:
            continue
        if any(use.node.op_type == "Attention" for use in value.uses()):
            _shape_again(copy.graph, value)
        value.shape = ir.Shape([value.shape[0], f"{value.name}.heads", value.shape[2], f"{value.name}.size"])
    return copy


def _shape_again(graph: ir.Graph, cache: ir.Value) -> None:
    """Give those that read a cache its heads and their size, whatever an empty one has.

    The zeros of the target stand for the input's own axes; -1 would divide by the size of what may be empty.
    """
    heads, size = ([] if cache.shape is None else list(cache.shape))[1::2]
    if not isinstance(heads, int) or not isinstance(size, int):
        return
    name = f"cache_of_{heads}_by_{size}"
    target = graph.initializers.get(name) or add_initializer(graph, name, np.array([0, heads, 0, size], np.int64))
    readers = list(cache.uses())
    reshape = ir.node("Reshape", [cache, target], name=f"{cache.name}_shaped")
    shaped = reshape.outputs[0]
    shaped.name, shaped.shape, shaped.type = reshape.name, cache.shape, cache.type
    for reader in readers:
        reader.node.replace_input_with(reader.idx, shaped)
    graph.insert_before(graph[0], reshape)
