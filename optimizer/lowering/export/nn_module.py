"""Lowering of any `nn.Module` with sample inputs: without configuration or task; roles follow from the graph."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.program import Axis, Program, Provenance, Signature
from planish.optimizer.lowering.checkpoint.checkpoint import quiet
from planish.optimizer.lowering.components import calls
from planish.optimizer.lowering.components.tasks import INFERENCE
from planish.optimizer.lowering.export import torch_export as exporter
from planish.optimizer.lowering.export.onnx_file import normalize, signature_of
from planish.optimizer.lowering.original.original import TorchOriginal
from planish.optimizer.system.scratch import scratch_folder

_RECORDED_OPSET = 17


def lower(
    module: Any, inputs: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]
) -> tuple[Program, TorchOriginal]:
    """Lower ``module``, which is put into evaluation mode, called by keyword with ``inputs`` (torch tensors)."""
    import torch

    module = module.eval()
    with torch.no_grad():
        outputs = tuple(calls.module(module, inputs))
    notes: tuple[str, ...] = ()
    try:
        graph, ranges, _ = exporter.export(module, calls.module, inputs, axes, outputs)
        tensors = {name: _tensor(name, value) for name, value in module.state_dict().items()}
        exporter.adopt_weights(graph, tensors, tensors.keys())
    except BadInput as refused:
        graph, notes = _by_running(module, inputs, axes, outputs, refused)
        ranges = {}
    signature = _signature(graph, ranges)
    provenance = Provenance("module", type(module).__name__, {"state_dict": _hash(module)}, notes)
    original = TorchOriginal(lambda: module)
    original.ask_for("model", calls.module.__name__, outputs)
    return Program({"model": graph}, {"model": signature}, INFERENCE, provenance), original


def _by_running(
    module: Any,
    inputs: Mapping[str, Any],
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    refused: BadInput,
) -> tuple[ir.Model, tuple[str, ...]]:
    """Lower with PyTorch's TorchScript exporter, which traces one run; raises ``refused`` if that fails as well.

    It supports recurrent layers with a dynamic sequence, but freezes value-dependent control flow. The comparison with
    the original on inputs of other sizes detects this.
    """
    import torch

    flat = exporter.wrap(module, calls.module, inputs, outputs)
    with torch.no_grad(), quiet(), warnings.catch_warnings(), scratch_folder() as folder:
        warnings.simplefilter("ignore")
        path = folder / "recorded.onnx"
        try:
            torch.onnx.export(
                flat,
                tuple(inputs.values()),
                path,
                dynamo=False,
                opset_version=_RECORDED_OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: dict(named) for name, named in axes.items()},
            )
        except Exception as error:
            raise refused from error  # the first refusal is the one to read
        graph: ir.Model = ir.from_proto(onnx.load(path))
    return graph, ("recorded from one run by torch's first exporter", *normalize(graph, None))


def _tensor(name: str, value: Any) -> ir.TensorProtocol:
    return ir.tensor(value.detach().cpu().contiguous().numpy(), name=name)


def _signature(graph: ir.Model, ranges: Mapping[str, Axis]) -> Signature:
    """The signature of the graph, with the size limits of the trace."""
    signature = signature_of(graph)
    return replace(signature, axes={name: ranges.get(name, axis) for name, axis in signature.axes.items()})


def _hash(module: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()
