"""An existing ONNX file: checked, brought to the canonical opset, and given a signature by looking at its graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.optimizer import onnx_io, registry
from planish.optimizer.errors import BadInput
from planish.optimizer.graph import opset_of, sizes_of
from planish.optimizer.lowering.checkpoint import quiet, sha256
from planish.optimizer.lowering.component import border_spec
from planish.optimizer.lowering.module import OPSET
from planish.optimizer.lowering.original import Answers, Cases, Original
from planish.optimizer.lowering.tasks import TASKS
from planish.optimizer.program import (
    Axis,
    Program,
    Provenance,
    Role,
    Signature,
    TensorSpec,
    as_continued,
    guess_role,
    in_float,
)
from planish.optimizer.reference import Prompt, thin
from planish.optimizer.verifier import picture, structural_faults

_THROUGH = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Transpose", "Flatten"})
"""Operators behind which an integer input is still the same integers."""
OLDEST_OPSET = 11
_ASSUMED_LONGEST = 512


def lower(path: Path, task: str | None) -> tuple[Program, OnnxOriginal]:
    """Read, check and normalize an ONNX file; its original is the file itself, run unoptimized by ONNX Runtime."""
    model = onnx_io.load(path)
    version = opset_of(model)
    if version < OLDEST_OPSET:
        raise BadInput(
            f"it is written in opset {version}", where=path, advice=f"export it at opset {OLDEST_OPSET} or later"
        )
    faults = structural_faults(model)
    if faults:
        raise BadInput(f"the graph is not valid: {faults[0]}", where=path, picture=picture(model, faults))
    notes = normalize(model, path.parent)
    signature = signature_of(model)
    config = _config_beside(path)
    program = Program(
        {"model": model},
        {"model": signature},
        task or _task_of(signature, config),
        Provenance("onnx", _architecture(model, config), _hashes(path, model), notes),
    )
    return program, OnnxOriginal(path)


def normalize(model: ir.Model, folder: Path | None) -> tuple[str, ...]:
    """Bring a graph that somebody else wrote to the canonical opset, inlined, with unique names and known shapes.

    Returns notes on what was done. ``folder`` is where its external data lies.
    """
    common.RemoveInitializersFromInputsPass()(model)
    common.InlinePass()(model)
    notes = _upgrade(model, folder)
    common.NameFixPass()(model)
    common.ShapeInferencePass()(model)
    return notes


def read_signature(path: Path) -> Signature:
    """The signature of an ONNX file as it is; raises as `lower` does."""
    model = onnx_io.load(path)
    common.RemoveInitializersFromInputsPass()(model)
    return signature_of(model)


def _upgrade(model: ir.Model, folder: Path | None) -> tuple[str, ...]:
    """Convert to the canonical opset; a model that cannot be converted stays as it is, and a note says so."""
    from onnxscript import version_converter

    version = opset_of(model)
    if version >= OPSET:
        return ()
    kept = model.clone()
    with quiet():
        try:
            version_converter.convert_version(model, OPSET, fallback=True)
        except (RuntimeError, ValueError, version_converter._version_converter.VersionConverterError) as error:
            model.graph = kept.graph
            return (f"left at opset {version}: {' '.join(str(error).split())[:200]}",)
    if opset_of(model) != OPSET:
        return (f"left at opset {version}: the converter of ONNX does not know how to raise it to {OPSET}",)
    if folder is not None:
        for graph in model.graphs():
            ir.external_data.set_base_dir(graph, folder)
    return (f"raised from opset {version} to {OPSET}",)


def signature_of(model: ir.Model) -> Signature:
    """Inputs with their roles and bounds, outputs with theirs, and the named axes."""
    outputs = in_float([_output_spec(value) for value in model.graph.outputs])
    inputs = tuple(as_continued(tensor, outputs) for tensor in in_float(list(map(_input_spec, model.graph.inputs))))
    names = [dim for tensor in inputs for dim in tensor.shape if isinstance(dim, str)]
    longest = _position_rows(model)
    axes = {name: Axis(name, 1, longest if _is_sequence(name, inputs) else None) for name in dict.fromkeys(names)}
    return Signature(inputs, outputs, axes)


def _input_spec(value: ir.Value) -> TensorSpec:
    dtype = value.dtype or ir.DataType.FLOAT
    tensor = border_spec(value, guess_role(value.name or "", dtype))
    if not dtype.is_integer():
        return tensor
    bound = _table_rows(value)
    role = Role.TOKENS if tensor.role is Role.VALUES and bound is not None else tensor.role
    return replace(tensor, role=role, bound=2 if role is Role.MASK else bound)


def _output_spec(value: ir.Value) -> TensorSpec:
    role = guess_role(value.name or "", value.dtype or ir.DataType.FLOAT)
    return border_spec(value, role if role in (Role.LOGITS, Role.HIDDEN) else Role.HIDDEN)


def _table_rows(value: ir.Value) -> int | None:
    """Rows of the smallest constant table that the integers of ``value`` index, through reshapes and casts."""
    rows: list[int] = []
    pending, seen = [value], {id(value)}
    while pending:
        for node, index in ((use.node, use.idx) for use in pending.pop().uses()):
            table = node.inputs[0] if node.op_type == "Gather" and index == 1 else None
            axis = node.attributes.get("axis")
            if table is not None and table.const_value is not None and (axis is None or axis.as_int() == 0):
                rows.append(sizes_of(table.const_value)[0])
            if node.op_type in _THROUGH and index == 0:
                fresh = [out for out in node.outputs if id(out) not in seen]
                seen |= {id(out) for out in fresh}
                pending += fresh
    return min(rows, default=None)


def _position_rows(model: ir.Model) -> int | None:
    """Rows of a table whose name speaks of positions: the longest sequence that the model can index."""
    rows = [
        sizes_of(value.const_value)[0]
        for name, value in model.graph.initializers.items()
        if "position" in name and value.const_value is not None and len(value.const_value.shape) == 2
        and value.const_value.dtype.is_floating_point()
    ]  # fmt: skip
    return min((count for count in rows if count > 1), default=None) or _ASSUMED_LONGEST


def _is_sequence(axis: str, inputs: Sequence[TensorSpec]) -> bool:
    """Whether an axis is the second one or later of integer inputs: tokens run along it."""
    return any(tensor.dtype.is_integer() and axis in tensor.shape[1:] for tensor in inputs)


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The config.json in the folder of the model, if there is one that can be read."""
    try:
        found = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _task_of(signature: Signature, config: Mapping[str, Any]) -> str:
    """The task that the outputs are named for and the configuration confirms, else plain inference."""
    from planish.optimizer.lowering.tasks import infer

    names = {tensor.name for tensor in signature.outputs}
    fitting = [task for task, spec in TASKS.items() if set(spec.outputs) <= names]
    architecture = next(iter(config.get("architectures") or []), None)
    try:
        wanted = None if architecture is None else infer(str(architecture), "config.json")
    except BadInput:
        wanted = None
    if wanted in fitting:
        return str(wanted)
    return fitting[0] if len(fitting) == 1 else "inference"


def _architecture(model: ir.Model, config: Mapping[str, Any]) -> str:
    named = next(iter(config.get("architectures") or []), None)
    return str(named or model.producer_name or "unknown")


def _hashes(path: Path, model: ir.Model) -> dict[str, str]:
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    data = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return {path.name: sha256(path)} | {name: sha256(path.parent / name) for name in sorted(data)}


class OnnxOriginal(Original):
    """The file itself, run by ONNX Runtime without optimizations."""

    description = "the ONNX file itself, ONNX Runtime without optimizations"

    def __init__(self, path: Path) -> None:
        self._path = path

    def answer(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Answers:
        """Run every case as the graph is written; the first few again optimized: the same sums in another order."""
        ((component, own),) = cases.items()
        backend = registry.backend("onnxruntime")
        plain = backend.load(onnx_io.load(self._path))
        outputs = [thin(plain.run(case)) for case in own]
        reordered = backend.open(self._path)
        return Answers({component: outputs}, {component: [thin(reordered.run(case)) for case in own[:precise]]})
