"""Decomposition of attention into MatMuls and a softmax, for targets that run it faster or lack the operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.optimizer.ir.edit import copy_location, name_nodes
from planish.optimizer.ir.graph import SPELLED_OUT
from planish.passes._mask_values import number
from planish.passes.legalize._masks import line_of


def softcap_of(node: ir.Node) -> float:
    """The cap of the scores of an Attention; 0 for none."""
    attribute = node.attributes.get("softcap")
    return 0.0 if attribute is None else attribute.as_float()


def heads_of(value: ir.Value | None) -> int | None:
    """The number of heads of queries or keys of shape (batch, heads, tokens, size), if it is known."""
    heads = None if value is None or value.shape is None or len(value.shape) != 4 else value.shape[1]
    return heads if isinstance(heads, int) else None


def size_of_heads(value: ir.Value | None) -> int | None:
    """The size of each head of queries or keys of shape (batch, heads, tokens, size), if it is known."""
    size = None if value is None or value.shape is None or len(value.shape) != 4 else value.shape[3]
    return size if isinstance(size, int) else None


def spell_out(
    graph: ir.Graph, node: ir.Node, added: ir.Value | None, author: str, share: ir.Value | None = None
) -> None:
    """Replace an Attention of rank four by softmax(cap(q · kᵀ · scale) + added) · v; ``author`` is the pass.

    Grouped queries, whose heads are a multiple of the key heads, get a group axis meanwhile; ``added`` is then one for
    all heads. With ``share``, each row of the result is multiplied by its number.
    """
    query, key, value = node.inputs[0], node.inputs[1], node.inputs[2]
    if query is None or key is None or value is None or query.shape is None or key.shape is None:
        raise ValueError(f"{node.name!r} was not checked")
    old, size = node.outputs[0], query.shape[3]
    written = node.attributes.get("scale")
    scale = written.as_float() if written is not None else float(np.asarray(size, np.float32)) ** -0.5
    heads, groups, cap = heads_of(query) or 1, heads_of(key) or 1, softcap_of(node)
    depth = size_of_heads(value) or -1
    tape = ir.tape.Tape()
    scaled = tape.op("Mul", [query, number(tape, scale)])
    turned = tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})
    if heads != groups:
        scaled = tape.op("Reshape", [scaled, line_of(tape, 0, groups, heads // groups, -1, size_of_heads(query) or -1)])
        turned, value = (tape.op("Unsqueeze", [one, line_of(tape, 2)]) for one in (turned, value))
        added = None if added is None else tape.op("Unsqueeze", [added, line_of(tape, 1)])
    scores = tape.op("MatMul", [scaled, turned])
    if cap:
        quotient = tape.op("Div", [scores, number(tape, cap)])
        scores = tape.op("Mul", [tape.op("Tanh", [quotient]), number(tape, cap)])
    masked = scores if added is None else tape.op("Add", [scores, added])
    weights = tape.op("Softmax", [masked], {"axis": -1})
    result = tape.op("MatMul", [weights, value])
    kind = ir.TensorType(ir.DataType.FLOAT)
    if heads == groups:
        table = ir.Shape([*query.shape[:3], key.shape[2]])
        shapes = {scaled: query.shape, turned: ir.Shape([*key.shape[:2], key.shape[3], key.shape[2]])}
        for output in (scaled, turned, scores, masked, weights):
            output.shape, output.type = shapes.get(output, table), kind
    else:
        result = tape.op("Reshape", [result, line_of(tape, 0, heads, -1, depth)])
    if share is not None:
        result.shape, result.type = old.shape, kind
        result = tape.op("Mul", [result, share])
    result.shape, result.type = old.shape, kind
    name_nodes(tape.nodes, f"{old.name}_spelled_out")
    # Marked, so that fuse-attention does not raise them again.
    for new in tape.nodes:
        new.metadata_props[SPELLED_OUT] = author
        copy_location(node, new)
    graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    name = old.name
    old.name, result.name = f"{name}_whole", name
