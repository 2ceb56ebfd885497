"""One change each to a graph of protocol buffers: what a broken exporter, an old one, or somebody hostile writes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, MutableSequence
from typing import Any

import onnx
import onnx.helper as oh

Mutation = Callable[[random.Random, onnx.ModelProto], None]
_INTS = (0, 1, -1, 2, 3, 7, -5, 64, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 33, (1 << 63) - 1, -(1 << 63))
_SIZES = (0, 1, 2, 3, 5, -1, -5, 1 << 16, 1 << 31, 1 << 40)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("inf"), float("nan"))
_NAMES = ("", "x", "y", "h", "w", "a/b", "\x1b[31m", "n" * 5000, "é", "..", "%s", "0")
_OPERATORS = (
    "Add", "Mul", "Sub", "Div", "MatMul", "Gemm", "Relu", "Softmax", "Identity", "Cast", "Transpose", "Reshape", "Expand",
    "Tile", "Range", "ConstantOfShape", "Shape", "Size", "Gather", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze",
    "Where", "Equal", "Loop", "If", "Scan", "Constant", "LayerNormalization", "Attention", "RotaryEmbedding", "Pad", "OneHot",
    "RandomNormal", "Dropout", "NonZero", "ReduceSum", "Pow", "Mod", "SequenceEmpty", "SequenceAt", "Optional", "Gelu",
    "QuantizeLinear", "MatMulInteger", "Resize", "TopK", "Unique", "StringNormalizer", "CastLike", "Trilu", "EyeLike",
)  # fmt: skip
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.example", "f", "\x07bell")
_LOCATIONS = ("w.bin", "gone.bin", "../w.bin", "/etc/passwd", "w.bin/", "n" * 5000, "", ".", "model.onnx", "a\0b")


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The main graph, all below it, and functions."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            pending += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for graph in graphs_of(model) for node in graph.node]


def _attributes(model: onnx.ModelProto) -> list[onnx.AttributeProto]:
    return [attribute for node in _nodes(model) for attribute in node.attribute]


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    held = [tensor for graph in graphs_of(model) if isinstance(graph, onnx.GraphProto) for tensor in graph.initializer]
    return held + [attribute.t for attribute in _attributes(model) if attribute.HasField("t")]


def _infos(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    plain = [graph for graph in graphs_of(model) if isinstance(graph, onnx.GraphProto)]
    return [info for graph in plain for info in (*graph.input, *graph.output, *graph.value_info)]


def _names(model: onnx.ModelProto) -> list[str]:
    return sorted({name for node in _nodes(model) for name in (*node.input, *node.output) if name} | set(_NAMES))


def _alter(rng: random.Random, items: MutableSequence[Any], choices: tuple[Any, ...]) -> None:
    """Change, remove, repeat or add one entry."""
    action = rng.randrange(4) if len(items) else 3
    if action == 0:
        items[rng.randrange(len(items))] = rng.choice(choices)
    elif action == 1:
        del items[rng.randrange(len(items))]
    elif action == 2:
        items.append(items[rng.randrange(len(items))])
    else:
        items.append(rng.choice(choices))


def attribute_value(rng: random.Random, model: onnx.ModelProto) -> None:
    """A value of the same type that is out of range, or nonsense."""
    attribute = rng.choice(_attributes(model))
    match attribute.type:
        case onnx.AttributeProto.INT:
            attribute.i = rng.choice(_INTS)
        case onnx.AttributeProto.FLOAT:
            attribute.f = rng.choice(_FLOATS)
        case onnx.AttributeProto.STRING:
            attribute.s = rng.choice((b"", b"x", b"NOTSET", b"\xff\xfe", b"linear"))
        case onnx.AttributeProto.INTS:
            _alter(rng, attribute.ints, _INTS)
        case onnx.AttributeProto.FLOATS:
            _alter(rng, attribute.floats, _FLOATS)


def attribute_type(rng: random.Random, model: onnx.ModelProto) -> None:
    """Another type under the same name, with or without a value of that type."""
    attribute = rng.choice(_attributes(model))
    if rng.random() < 0.2:
        attribute.type = rng.randrange(-1, 20)  # the value stays
        return
    other = oh.make_attribute(attribute.name, rng.choice((1, -1, 1.5, "ab", [1, 2], [1.5, 2.5], ["a", "b"])))
    attribute.CopyFrom(other)


def attribute_name(rng: random.Random, model: onnx.ModelProto) -> None:
    """One removed, renamed, doubled, without a value, or one that refers to a function's."""
    node = rng.choice([node for node in _nodes(model) if node.attribute])
    attribute = rng.choice(list(node.attribute))
    match rng.randrange(5):
        case 0:
            node.attribute.remove(attribute)
        case 1:
            attribute.name = rng.choice(("axis", "to", "perm", "value", "body", "then_branch", *_NAMES))
        case 2:
            node.attribute.append(attribute)
        case 3:
            attribute.ref_attr_name = rng.choice(("axis", "factor", ""))
        case 4:
            for field in ("i", "f", "s", "t", "g"):
                attribute.ClearField(field)


def attribute_added(rng: random.Random, model: onnx.ModelProto) -> None:
    """One that the operator has not, or has without this node saying so."""
    value: Any = rng.choice((rng.choice(_INTS), rng.choice(_FLOATS), "x", [0, 1], [-1], [1.5]))
    name = rng.choice(("axis", "axes", "to", "perm", "keepdims", "allowzero", "epsilon", "saturate", "start", "new"))
    rng.choice(_nodes(model)).attribute.append(oh.make_attribute(name, value))


def rewire(rng: random.Random, model: onnx.ModelProto) -> None:
    """Inputs and outputs of a node changed, removed, repeated or added."""
    node = rng.choice(_nodes(model))
    _alter(rng, node.input if rng.random() < 0.7 else node.output, tuple(_names(model)))


def rename(rng: random.Random, model: onnx.ModelProto) -> None:
    """A value or node, everywhere or at one place only."""
    new = rng.choice(_names(model))
    if rng.random() < 0.3:
        rng.choice(_nodes(model)).name = rng.choice((new, rng.choice(_nodes(model)).name))
        return
    old = rng.choice(_names(model))
    for graph in graphs_of(model):
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
    for item in (*_infos(model), *_tensors(model)):
        if item.name == old:
            item.name = new


def operator(rng: random.Random, model: onnx.ModelProto) -> None:
    """Another operator with the same inputs, or another domain."""
    node = rng.choice(_nodes(model))
    if rng.random() < 0.8:
        node.op_type = rng.choice((*_OPERATORS, ""))
    else:
        node.domain = rng.choice(_DOMAINS)


def order(rng: random.Random, model: onnx.ModelProto) -> None:
    """Two nodes exchanged, one gone, or one there twice."""
    graph = rng.choice(list(graphs_of(model)))
    nodes = list(graph.node)
    if not nodes:
        return
    match rng.randrange(3):
        case 0:
            rng.shuffle(nodes)
        case 1:
            nodes.pop(rng.randrange(len(nodes)))
        case 2:
            nodes.append(rng.choice(nodes))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def declared_type(rng: random.Random, model: onnx.ModelProto) -> None:
    """Element type, rank, sizes or kind of an input, an output or a value between."""
    info = rng.choice(_infos(model))
    tensor = info.type.tensor_type
    match rng.randrange(7):
        case 0:
            tensor.elem_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 23, 26, 99))
        case 1:
            info.type.tensor_type.ClearField("shape")
        case 2:
            info.ClearField("type")
        case 3:
            element = oh.make_tensor_type_proto(1, [2, 2])
            make = rng.choice((oh.make_sequence_type_proto, oh.make_optional_type_proto))
            info.type.CopyFrom(make(element))
        case 4:
            tensor.shape.dim.add().dim_param = rng.choice(("batch", "n", ""))
        case _:
            dims = tensor.shape.dim
            if len(dims):
                _resize(rng, dims[rng.randrange(len(dims))])


def _resize(rng: random.Random, dim: Any) -> None:
    if rng.random() < 0.6:
        dim.dim_value = rng.choice(_SIZES)
    else:
        dim.dim_param = rng.choice(("batch", "sequence", "n", "", "a + b", "past", "\x1b"))


def versions(rng: random.Random, model: onnx.ModelProto) -> None:
    """Opsets and the IR version."""
    imports = model.opset_import
    match rng.randrange(5):
        case 0:
            imports[0].version = rng.choice((-1, 0, 1, 7, 10, 1 << 40, *range(11, 28)))
        case 1:
            del imports[0]
        case 2:
            imports.append(oh.make_opsetid(rng.choice(_DOMAINS), rng.choice((1, 2, 13, 23))))
        case 3:
            imports[0].domain = rng.choice(_DOMAINS)
        case 4:
            model.ir_version = rng.choice((0, 1, 3, 4, 7, 8, 9, 11, 12, 13, 14, 99, -1))


def tensor_bytes(rng: random.Random, model: onnx.ModelProto) -> None:
    """Bytes, sizes, type or values of a constant."""
    tensor = rng.choice(_tensors(model))
    if (
        tensor.raw_data == b""
        and tensor.data_location == onnx.TensorProto.DEFAULT
        and rng.random() < 0.5
        and tensor.data_type in (1, 6, 7)
    ):
        array = onnx.numpy_helper.to_array(tensor)
        tensor.ClearField("float_data"), tensor.ClearField("int32_data"), tensor.ClearField("int64_data")
        tensor.raw_data = array.tobytes()
    match rng.randrange(7):
        case 0:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case 1:
            tensor.raw_data = tensor.raw_data + b"\1" * rng.randrange(9)
        case 2:
            _alter(rng, tensor.dims, _SIZES)
        case 3:
            tensor.data_type = rng.choice((0, *range(1, 27), 99))
        case 4:
            _alter(rng, tensor.float_data, _FLOATS)
        case 5:
            _alter(rng, tensor.int64_data, _INTS)
        case 6:
            tensor.name = rng.choice(_names(model))


def integers(rng: random.Random, model: onnx.ModelProto) -> None:
    """The value of a constant of integers: sizes, axes, indices, rounds."""
    held = [tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.DEFAULT]
    tensor = rng.choice([tensor for tensor in held if tensor.data_type == onnx.TensorProto.INT64])
    array = onnx.numpy_helper.to_array(tensor).copy()
    if array.size:
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice(_INTS)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def external(rng: random.Random, model: onnx.ModelProto) -> None:
    """A constant in a file, with true or false words about it; `write` puts 4096 bytes there."""
    tensor = rng.choice(_tensors(model))
    facts = {"location": rng.choice((*_LOCATIONS, "w.bin", "w.bin")), "offset": "0"}
    match rng.randrange(5):
        case 0:
            facts["offset"] = rng.choice(("-1", "x", "4090", "10000", "9" * 30, ""))
        case 1:
            facts["length"] = rng.choice(("0", "-1", "4", "x", "9" * 30))
        case 2:
            del facts["location"]
    for field in ("raw_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)


def border(rng: random.Random, model: onnx.ModelProto) -> None:
    """Inputs and outputs: one more, one less, one twice, a constant that is an input, an input that is given back."""
    graph = model.graph
    match rng.randrange(6):
        case 0:
            graph.output.append(oh.make_empty_tensor_value_info(rng.choice(_names(model))))
        case 1:
            del graph.output[rng.randrange(len(graph.output))]
        case 2:
            graph.output.append(rng.choice(list(graph.output)))
        case 3:
            graph.input.append(rng.choice(list(graph.input)))
        case 4:
            del graph.input[rng.randrange(len(graph.input))]
        case 5:
            constant = rng.choice(list(graph.initializer))
            graph.input.append(oh.make_tensor_value_info(constant.name, constant.data_type, list(constant.dims)))


def function(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node becomes a call of a function: of another opset, that calls itself, with other inputs."""
    node = rng.choice(list(model.graph.node))
    body = onnx.NodeProto.FromString(node.SerializeToString())
    inputs, outputs = list(dict.fromkeys(filter(None, node.input))), list(dict.fromkeys(filter(None, node.output)))
    imports = [oh.make_opsetid("", rng.choice((23, 17, 13, 20)))]
    if rng.random() < 0.2:
        body.domain, body.op_type = "f", "made"
        imports.append(oh.make_opsetid("f", 1))
    made = oh.make_function("f", "made", inputs, outputs, [body], imports)
    call = oh.make_node("made", [*inputs, *(["extra"] if rng.random() < 0.2 else [])], outputs, domain="f")
    node.CopyFrom(call)
    model.functions.append(made)
    model.opset_import.append(oh.make_opsetid("f", 1))


def subgraph(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node moves into both branches of an If, or into a Loop of some rounds."""
    node = rng.choice(list(model.graph.node))
    body = onnx.NodeProto.FromString(node.SerializeToString())
    branch = oh.make_graph(
        [body], "branch", [], [oh.make_empty_tensor_value_info(name) for name in node.output if name]
    )
    model.graph.initializer.append(oh.make_tensor("always", onnx.TensorProto.BOOL, [], [rng.random() < 0.5]))
    outputs = [name for name in node.output if name]
    node.CopyFrom(oh.make_node("If", ["always"], outputs, then_branch=branch, else_branch=branch))


def metadata(rng: random.Random, model: onnx.ModelProto) -> None:
    """What an application reads, and what it does not."""
    text = rng.choice(_NAMES)
    rng.choice([model, model.graph]).doc_string = text
    item: Any = rng.choice([model, model.graph, rng.choice(_nodes(model))])
    item.metadata_props.add(key=rng.choice(_NAMES), value=text)


def endless(rng: random.Random, model: onnx.ModelProto) -> None:
    """A chain that doubles, or one operator that makes much of little."""
    graph = model.graph
    size = rng.choice((1 << 14, 1 << 22, 1 << 33))
    graph.initializer.append(oh.make_tensor("much", onnx.TensorProto.INT64, [1], [size]))
    graph.initializer.append(oh.make_tensor("little", onnx.TensorProto.INT64, [1], [1]))
    nodes: list[onnx.NodeProto]
    match rng.randrange(5):
        case 0:
            nodes = [oh.make_node("ConstantOfShape", ["much"], ["big"])]
        case 1:
            nodes = [oh.make_node("Expand", ["little", "much"], ["big"])]
        case 2:
            nodes = [oh.make_node("Tile", ["little", "much"], ["big"])]
        case 3:
            count = rng.choice((3, 20, 40))
            names = ["little", *(f"grow{index}" for index in range(count - 1)), "big"]
            pairs = itertools.pairwise(names)
            operator = rng.choice(("Concat", "Mul", "Add"))
            kept = {"axis": 0} if operator == "Concat" else {}
            nodes = [oh.make_node(operator, [old, old], [new], **kept) for old, new in pairs]
        case _:
            shape = oh.make_tensor("value", onnx.TensorProto.INT64, [1], [1])
            fill = oh.make_node("ConstantOfShape", ["much"], ["sizes"], value=shape)
            nodes = [fill, oh.make_node("ReduceSum", ["sizes"], ["big"])]
    graph.node.extend([*nodes, oh.make_node("Shape", ["big"], ["length"])])
    graph.output.append(oh.make_empty_tensor_value_info(rng.choice(("big", "length"))))


ALL: tuple[Mutation, ...] = (
    attribute_value, attribute_type, attribute_name, attribute_added, rewire, rename, operator, order, declared_type,
    versions, tensor_bytes, integers, external, border, function, subgraph, metadata, endless,
)  # fmt: skip


def mutate(rng: random.Random, model: onnx.ModelProto) -> None:
    """One random change; a kind of change that finds nothing to change here is another's turn."""
    for change in rng.sample(ALL, len(ALL)):
        try:
            change(rng, model)
        except (IndexError, ValueError, TypeError):  # nothing of this kind, or a number that the field cannot hold
            continue
        return
