"""Export of an `nn.Module` with sample inputs: torch.export, PyTorch's ONNX exporter, then normalized inputs and
outputs."""

from __future__ import annotations

import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.edit import rows_for
from planish.optimizer.ir.graph import constant_of
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.lazy_tensors import origin_of
from planish.optimizer.ir.program import SUM, Axis
from planish.optimizer.lowering.checkpoint.checkpoint import quiet
from planish.optimizer.lowering.checkpoint.weights import Weight
from planish.optimizer.lowering.components.calls import Call

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding."""

_NO_LIMIT = 1 << 31

Axes = Mapping[str, Mapping[int, str]]
"""The name of each dynamic axis by position, for each input."""


@dataclass
class Given:
    """Names of the tensors of a call: the selected ones in order, and the others."""

    chosen: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def wrap(module: Any, call: Call, names: Iterable[str], outputs: Sequence[str]) -> Any:
    """A module that takes the inputs called ``names`` in order and returns the selected outputs as a tuple.

    It returns all outputs if none are selected, or if those are missing (a projection has no hidden states). Its
    attribute ``given`` then holds their names.
    """
    import torch

    keywords = list(names)

    class Flat(torch.nn.Module):
        # The exporter writes the name of this class into the metadata of every node. It stands for the whole program,
        # and must not follow the file that it is written in: engines would differ whenever the file moves.
        __module__ = "planish.optimizer.lowering.module"

        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.given = Given()

        def forward(self, *args: Any) -> tuple[Any, ...]:
            result = call(self.module, dict(zip(keywords, args, strict=True)))
            wanted = bool(outputs) and set(outputs) <= result.keys()
            # Loaders take the first output where they know none by its name.
            chosen = tuple(outputs) if wanted else tuple(sorted(result, key="last_hidden_state".__ne__))
            self.given.chosen, self.given.left_out = chosen, tuple(name for name in result if name not in chosen)
            return tuple(result[name] for name in chosen)

    return Flat()


def export(
    module: Any, call: Call, inputs: Mapping[str, Any], axes: Axes, outputs: Sequence[str]
) -> tuple[ir.Model, dict[str, Axis], Given]:
    """Lower one ``call`` of ``module`` with ``inputs`` (torch tensors by keyword) to an ONNX graph at opset 23.

    ``axes`` names the dynamic axes, ``outputs`` the selected results (see `wrap`). Returns the graph with initializers
    of torch, each axis with the sizes that the trace supports, and the names of the outputs. BadInput if torch cannot
    capture the module with these dynamic axes.
    """
    import torch

    flat = wrap(module, call, inputs, outputs)
    dynamic = {name: dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in inputs}
    # strict=False below: TorchDynamo rejects many forward methods of transformers that plain tracing accepts.
    with torch.no_grad(), quiet(), _shared_heads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _speechless():
                captured = torch.export.export(
                    flat, tuple(inputs.values()), dynamic_shapes=(tuple(dynamic.values()),), strict=False
                )
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=list(inputs),
                output_names=list(flat.given.chosen),
            )
        except Exception as error:
            raise BadInput(
                f"torch cannot capture {type(module).__name__}: {_named_axes(cause_of(error), inputs, axes)}",
                advice="a module must trace with its batch and sequence axes dynamic",
            ) from error
    if program is None:
        raise BadInput(f"torch gave no graph for {type(module).__name__}")
    # optimize=False above: passes of Planish expect the exporter's unmodified patterns.
    model = program.model
    _drop_scalar_expands(model)
    spread_masks(model)
    return model, _name_axes(model, axes, _limits(captured)), flat.given


def cause_of(error: BaseException) -> str:
    """The root cause of an error in one line, with the module of the model in which it occurred.

    Messages of torch continue with pages of advice, stacks and object addresses.
    """
    bottom = error
    while bottom.__cause__ is not None:
        # The exporter wraps errors several times; the first one names the operator.
        bottom = bottom.__cause__
    lines = [line.strip() for line in str(bottom).splitlines() if line.strip()]
    text = re.sub(
        r" at 0x[0-9a-f]+| For more information, run with .*", "", " ".join(lines[: _TOLD.get(_kind(bottom), 1)])
    )
    branch = re.search(r"data-dependent expression (.+?)(?: \(unhinted|\.|$)", text)
    if branch is not None:
        text = f"a branch depends on computed values ({branch[1]})"
    owners = [
        type(frame.f_locals["self"]).__name__
        for frame, _ in traceback.walk_tb(bottom.__traceback__)
        if "self" in frame.f_locals and frame.f_globals.get("__name__", "").startswith("transformers.models.")
    ]
    where = f" (in {owners[-1]})" if owners else ""
    return f"{_kind(bottom)}: {text[:300]}{where}"


_TOLD = {"UserError": 2}
"""The informative lines of a message: constraints are listed after the first line."""


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _named_axes(text: str, inputs: Mapping[str, Any], axes: Axes) -> str:
    """A message of torch.export with our names of axes."""
    names = list(inputs)

    def name_of(match: re.Match[str]) -> str:
        name, index = names[int(match[1])], int(match[2])
        return f"{axes.get(name, {}).get(index, f'axis {index}')} of {name}"

    return re.sub(r"L\['args'\]\[(\d+)\]\.size\(\)\[(\d+)\]", name_of, text)


@contextmanager
def _speechless() -> Iterator[None]:
    """Suppress the graph dumps and duplicate log messages of torch.export in the block."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # torch prints the partial graph directly to stderr.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _shared_heads() -> Iterator[None]:
    """Mark attention with fewer key heads than query heads as grouped in the block, instead of relying on broadcasting.

    The exporter refuses one key head for many query heads (multi-query attention) without that mark.
    """
    import torch

    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, *args: Any, **options: Any) -> Any:
        shared = query.dim() == 4 and key.shape[1] != query.shape[1]
        return original(query, key, *args, **(options | ({"enable_gqa": True} if shared else {})))

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _limits(captured: Any) -> dict[str, int]:
    """Maximum size of each symbol in the trace."""
    limits = {}
    for symbol, interval in captured.range_constraints.items():
        if getattr(interval.upper, "is_Integer", False) and int(interval.upper) < _NO_LIMIT:
            limits[str(symbol)] = int(interval.upper)
    return limits


def _name_axes(model: ir.Model, axes: Axes, symbols: Mapping[str, int]) -> dict[str, Axis]:
    """Replace torch's symbols by axis names everywhere, and collect the limits of each axis.

    An axis that is a sum (`past + sequence`) has an arbitrary expression in torch.
    """
    names: dict[str, str] = {}
    limits: dict[str, list[int]] = {
        name: [] for by_index in axes.values() for name in by_index.values() if SUM not in name
    }
    for value in model.graph.inputs:
        for index, axis in axes.get(value.name or "", {}).items():
            dim = None if value.shape is None else value.shape[index]
            if isinstance(dim, int) or dim is None:
                raise BadInput(
                    f"axis {axis!r} of input {value.name!r} is fixed at {dim}: the module does not treat it as dynamic"
                )
            names[str(dim.value)] = axis
            limits.get(axis, []).extend([symbols[str(dim.value)]] if str(dim.value) in symbols else [])
    _rename_symbols(model, names)
    return {name: Axis(name, 0 if name == PAST else 1, min(upper, default=None)) for name, upper in limits.items()}


def _rename_symbols(model: ir.Model, names: Mapping[str, str]) -> None:
    """Write axis names into every shape; expressions such as `2*s1` are renamed inside."""
    if not names:
        return
    # s1 must not match within s10.
    longest_first = sorted(names, key=len, reverse=True)
    symbol = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(dim, symbol, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, symbol: re.Pattern[str], names: Mapping[str, str]) -> int | str | None:
    if not isinstance(dim, ir.SymbolicDim):
        return dim
    text = None if dim.value is None else symbol.sub(lambda match: names[match.group(1)], dim.value)
    # Sums in one order: 'a + b' and 'b + a' are the same axis.
    return text if text is None or not re.fullmatch(r"\w+( \+ \w+)+", text) else SUM.join(sorted(text.split(SUM)))


def _drop_scalar_expands(model: ir.Model) -> None:
    """Replace an Expand of a scalar to a scalar shape by the scalar: OpenVINO reads that shape as a number."""
    for node in [node for node in model.graph if node.op_type == "Expand"]:
        target = None if node.inputs[1] is None else node.inputs[1].producer()
        # The exporter casts the empty shape to int64.
        while target is not None and target.op_type == "Cast" and target.inputs[0] is not None:
            target = target.inputs[0].producer()
        shape = None if target is None or target.op_type != "Constant" else constant_of(target.outputs[0])
        if node.inputs[0] is not None and shape is not None and shape.size == 0:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)


def spread_masks(model: ir.Model) -> None:
    """Broadcast the mask of each attention to a row for every query: no CPU runtime broadcasts that axis."""
    for node in [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) > 3]:
        query, mask = node.inputs[0], node.inputs[3]
        if query is not None and mask is not None:
            spread, nodes = rows_for(query, mask)
            for index, fresh in enumerate(nodes):
                fresh.name = f"{node.name}_mask_{index}"
                fresh.outputs[0].name = f"{fresh.name}_out"
            model.graph.insert_before(node, nodes)
            node.replace_input_with(3, spread)


PREFIX = "module."
"""Prefix of parameter names by `wrap`."""


def parameters_of(model: ir.Model) -> set[str]:
    """Names of the initializers of an exported graph without prefix: parameters and buffers that outputs depend on."""
    return {name.removeprefix(PREFIX) for name in model.graph.initializers}


def adopt_weights(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol], parameters: Set[str]) -> None:
    """Bind each initializer to the tensor of its parameter, and rename it to the parameter's name.

    Initializers without such a tensor (buffers, lifted constants) keep their traced data. ValueError if one of
    ``parameters`` is left, since it was traced without data.
    """
    for name, value in list(model.graph.initializers.items()):
        plain = name.removeprefix(PREFIX)
        if plain in parameters and plain not in tensors:
            raise ValueError(f"no weights are registered for {plain!r}")
        tensor = tensors.get(plain, value.const_value)
        value.name = plain
        value.const_value = tensor
        if tensor is not None:
            tensor.name = plain


def fold_stored_transposes(model: ir.Model) -> None:
    """Replace `Transpose(weight)` by a lazily transposed reference; no weight is read for it."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
        stored = None if weight is None else origin_of(weight.const_value)
        if weight is None or not isinstance(stored, Weight):
            continue
        perm = node.attributes.get("perm")
        order = tuple(perm.as_ints()) if perm is not None else tuple(reversed(range(len(stored.shape))))
        # Tied weights may be transposed at several places: they share one reference.
        name = f"{weight.name}.transposed"
        if name not in model.graph.initializers:
            turned = stored.transposed(order)
            value = ir.Value(
                name=name,
                shape=ir.Shape(turned.shape),
                type=ir.TensorType(turned.dtype),
                const_value=turned.tensor(name),
            )
            model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(node.outputs[0], model.graph.initializers[name])
        model.graph.remove(node, safe=True)
        if not weight.uses():
            del model.graph.initializers[weight.name or ""]


def to_torch(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Copies of arrays as contiguous torch tensors, since models call `view` on their inputs."""
    import torch

    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in inputs.items()}
