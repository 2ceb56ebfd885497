"""An existing ONNX file: validated, converted to the canonical opset, with a signature derived from its graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.optimizer.errors import BadInput, CheckFailed, in_one_line
from planish.optimizer.interfaces import registry
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.annotations import Annotations
from planish.optimizer.ir.data_propagation import correct_shapes
from planish.optimizer.ir.graph import opset_of, sizes_of
from planish.optimizer.ir.kv_cache import as_continued, in_float
from planish.optimizer.ir.program import SUM, Axis, Program, Provenance, Role, Signature, TensorSpec, guess_role
from planish.optimizer.ir.shape_inference import follows_few, infer_shapes, quiet_libraries
from planish.optimizer.ir.verifier import picture, structural_faults
from planish.optimizer.lowering.checkpoint.checkpoint import quiet, sha256
from planish.optimizer.lowering.components.component import border_spec
from planish.optimizer.lowering.components.tasks import INFERENCE, TASKS, architecture_of
from planish.optimizer.lowering.export.torch_export import OPSET
from planish.optimizer.lowering.original import limited_process
from planish.optimizer.lowering.original.original import Answers, Cases, Original
from planish.optimizer.runtime.teacher_forcing import Prompt
from planish.optimizer.system.json_files import read_object

_THROUGH = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Transpose", "Flatten"})
"""Operators that pass integer inputs on unchanged."""
_LEAST_RANKS = {
    Role.TOKENS: 1, Role.MASK: 1, Role.SEGMENTS: 1, Role.POSITIONS: 1, Role.BOXES: 2, Role.PIXELS: 2, Role.FEATURES: 2,
    Role.CACHE: 4,
}  # fmt: skip
OLDEST_OPSET = 11
_ASSUMED_LONGEST = 512
_LARGEST_SIZE = 1 << 62
_AT_THE_BORDER = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL, ir.DataType.INT8,
        ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16,
        ir.DataType.UINT32, ir.DataType.UINT64,
    }
)  # fmt: skip
"""Types that NumPy and the runtimes exchange."""
_TENSORS_ONLY = "end the graph at tensors of numbers; inside it other values are fine"


def lower(path: Path, task: str | None) -> tuple[Program, OnnxOriginal]:
    """Read, validate and normalize an ONNX file. Its original is the file itself, run by ONNX Runtime without
    optimizations."""
    model = onnx_io.load(path)
    version = opset_of(model)
    if version < OLDEST_OPSET:
        raise BadInput(
            f"it is written in opset {version}", where=path, advice=f"export it at opset {OLDEST_OPSET} or later"
        )
    _check_structure(model, path)
    _check_border(model, path)
    notes = normalize(model, path.parent, path)
    # Kernels of a runtime may lack the newest opset: then the file's own opset is kept.
    if opset_of(model) != version and not _loads(model):
        model = onnx_io.load(path)
        normalize(model, path.parent, path, raising=False)
        notes = (f"left at opset {version}: ONNX Runtime does not know all of its operators at {OPSET}",)
    signature = signature_of(model)
    config = _config_beside(path)
    program = Program(
        {"model": model},
        {"model": signature},
        task or _task_of(signature, config),
        Provenance("onnx", _architecture(model, config), _hashes(path, model), notes),
    )
    return program, OnnxOriginal(path)


def _check_structure(model: ir.Model, where: object) -> None:
    faults = structural_faults(model)
    if faults:
        raise BadInput(f"the graph is not valid: {faults[0]}", where=where, picture=picture(model, faults))


def _check_border(model: ir.Model, path: Path) -> None:
    """Raise BadInput without outputs, and for inputs or outputs that are no numeric tensors."""
    if not model.graph.outputs:
        raise BadInput("the graph has no outputs", where=path, advice="it computes nothing that anybody could read")
    twice = [name for name, count in Counter(value.name for value in model.graph.outputs).items() if count > 1]
    if twice:
        raise BadInput(f"the output {twice[0]!r} is listed twice", where=path, advice="give each a name of its own")
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            where = f"{path}, {kind} {value.name!r}"
            if value.type is not None and not isinstance(value.type, ir.TensorType):
                raise BadInput(f"this is no tensor but {value.type}", where=where, advice=_TENSORS_ONLY)
            if value.dtype is not None and value.dtype not in _AT_THE_BORDER:
                raise BadInput(f"this is a tensor of {value.dtype}", where=where, advice=_TENSORS_ONLY)
            sizes = [dim for dim in value.shape or () if isinstance(dim, int)]
            if any(not 0 <= size < _LARGEST_SIZE for size in sizes):
                raise BadInput(f"no tensor has the shape {value.shape}", where=where)


def _loads(model: ir.Model) -> bool:
    """True if ONNX Runtime, if installed, opens a graph; its kernels may lag behind the standard."""
    backend = registry.interpreter()
    if backend.missing() is not None or not follows_few(model):
        return True
    try:
        backend.load(model)
    except CheckFailed:
        return False
    return True


def normalize(model: ir.Model, folder: Path | None, where: object = None, *, raising: bool = True) -> tuple[str, ...]:
    """Convert an untrusted graph to the canonical opset, inlined, with unique names and inferred shapes.

    Returns notes on the changes. ``folder`` is the location of its external data. BadInput if a function calls itself,
    is called with unknown inputs or attributes, or is of another opset.
    """
    annotations, called = Annotations.of(model), bool(model.functions)
    with quiet_libraries():
        common.RemoveInitializersFromInputsPass()(model)
        try:
            common.InlinePass()(model)
        except (ir.passes.PassError, ir.passes.PreconditionError, ValueError) as error:
            raise BadInput(f"its functions cannot be inlined: {error}", where=where) from error
        if called:  # an attribute may be what its operator does not take
            _check_structure(model, where)
        notes = _upgrade(model, folder) if raising else ()
        common.NameFixPass()(model)
    # Before inference, which would otherwise start from wrong declared shapes.
    correct_shapes(model)
    infer_shapes(model)
    annotations.restore(model)
    return notes


def read_signature(path: Path) -> Signature:
    """The signature of an unchanged ONNX file; raises as `lower` does."""
    model = onnx_io.load(path)
    common.RemoveInitializersFromInputsPass()(model)
    return signature_of(model)


def _upgrade(model: ir.Model, folder: Path | None) -> tuple[str, ...]:
    """Convert to the canonical opset. A model that cannot be converted stays unchanged, with a note."""
    from onnxscript import version_converter

    version = opset_of(model)
    if version >= OPSET:
        return ()
    kept = model.clone()
    with quiet():
        try:
            version_converter.convert_version(model, OPSET, fallback=True)
        except (RuntimeError, ValueError, version_converter._version_converter.VersionConverterError) as error:
            # A failed conversion leaves a half-converted graph.
            model.graph = kept.graph
            return (f"left at opset {version}: {in_one_line(error)}",)
    if opset_of(model) != OPSET:
        return (f"left at opset {version}: the converter of ONNX does not know how to raise it to {OPSET}",)
    if folder is not None:
        for graph in model.graphs():
            ir.external_data.set_base_dir(graph, folder)
    return (f"raised from opset {version} to {OPSET}",)


def signature_of(model: ir.Model) -> Signature:
    """Inputs with roles and bounds, outputs with roles, and the named axes."""
    outputs = in_float([_output_spec(value) for value in model.graph.outputs])
    inputs = tuple(as_continued(tensor, outputs) for tensor in in_float(list(map(_input_spec, model.graph.inputs))))
    names = [axis for tensor in inputs for dim in tensor.shape if isinstance(dim, str) for axis in dim.split(SUM)]
    longest = _position_rows(model)
    axes = {name: Axis(name, 1, longest if _is_sequence(name, inputs) else None) for name in dict.fromkeys(names)}
    return Signature(inputs, outputs, axes)


def _input_spec(value: ir.Value) -> TensorSpec:
    dtype = value.dtype or ir.DataType.FLOAT
    tensor = _in_its_role(border_spec(value, guess_role(value.name or "", dtype)))
    if not dtype.is_integer():
        return tensor
    bound = _table_rows(value)
    role = Role.TOKENS if tensor.role is Role.VALUES and bound is not None else tensor.role
    return replace(tensor, role=role, bound=2 if role is Role.MASK else bound)


def _in_its_role(tensor: TensorSpec) -> TensorSpec:
    """The tensor without the role of its name, if its shape does not fit that role."""
    rank, last = len(tensor.shape), tensor.shape[-1] if tensor.shape else 0
    fits = rank >= _LEAST_RANKS.get(tensor.role, 0) and (tensor.role is not Role.BOXES or last == 4)
    return tensor if fits else replace(tensor, role=Role.VALUES)


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
    """Rows of a position table (by its name), which limit the sequence length."""
    rows = [
        sizes_of(value.const_value)[0]
        for name, value in model.graph.initializers.items()
        if "position" in name and value.const_value is not None and len(value.const_value.shape) == 2
        and value.const_value.dtype.is_floating_point()
    ]  # fmt: skip
    return min((count for count in rows if count > 1), default=None) or _ASSUMED_LONGEST


def _is_sequence(axis: str, inputs: Sequence[TensorSpec]) -> bool:
    """True if an axis is the second or a later one of an integer input, hence a token axis."""
    return any(tensor.dtype.is_integer() and axis in tensor.shape[1:] for tensor in inputs)


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The config.json beside the model, empty if it is missing; BadInput if it is no JSON object."""
    try:
        return read_object(path.parent / "config.json")
    except FileNotFoundError:
        return {}


def _task_of(signature: Signature, config: Mapping[str, Any]) -> str:
    """The task by output names, confirmed by the configuration; else plain inference."""
    from planish.optimizer.lowering.components.tasks import infer

    names = {tensor.name for tensor in signature.outputs}
    fitting = [task for task, spec in TASKS.items() if set(spec.outputs) <= names]
    architecture = architecture_of(config)
    try:
        # Output names are ambiguous (logits); the configuration decides between tasks.
        wanted = None if architecture is None else infer(architecture, "config.json")
    except BadInput:
        wanted = None
    if wanted in fitting:
        return str(wanted)
    return fitting[0] if len(fitting) == 1 else INFERENCE


def _architecture(model: ir.Model, config: Mapping[str, Any]) -> str:
    return architecture_of(config) or model.producer_name or "unknown"


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
        """Run every case on the unchanged graph, and the first cases also with optimizations: another order of
        summation."""
        ((component, component_cases),) = cases.items()
        answered = limited_process.run(self._path, component_cases, precise)
        if answered.note is not None:
            self.description = f"{type(self).description} (no others: {answered.note})"
            limited_process.announce(self._path, answered.note)
        precisely = None if answered.reordered is None else {component: answered.reordered}
        return Answers({component: answered.outputs}, precisely)
