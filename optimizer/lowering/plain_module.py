"""Any `nn.Module` with sample inputs: no configuration, no task; roles are read off the graph."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.lowering import module as exporter
from planish.optimizer.lowering.onnx_file import signature_of
from planish.optimizer.lowering.original import TorchOriginal
from planish.optimizer.program import Axis, Program, Provenance, Signature


def lower(
    module: Any, inputs: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]
) -> tuple[Program, TorchOriginal]:
    """Lower ``module``, which is put into evaluation mode, called by keyword with ``inputs`` (torch tensors)."""
    import torch

    module = module.eval()
    with torch.no_grad():
        outputs = tuple(exporter.flatten(module(**inputs)))
    graph, ranges = exporter.export(module, inputs, axes, outputs)
    tensors = {name: _tensor(name, value) for name, value in module.state_dict().items()}
    exporter.adopt_weights(graph, tensors, tensors.keys())
    signature = _signature(graph, ranges)
    provenance = Provenance("module", type(module).__name__, {"state_dict": _hash(module)})
    return Program({"model": graph}, {"model": signature}, "inference", provenance), TorchOriginal(
        lambda: module, outputs
    )


def _tensor(name: str, value: Any) -> ir.TensorProtocol:
    return ir.tensor(value.detach().cpu().contiguous().numpy(), name=name)


def _signature(graph: ir.Model, ranges: Mapping[str, Axis]) -> Signature:
    """What the graph shows, with the ranges that the trace found."""
    found = signature_of(graph)
    return replace(found, axes={name: ranges.get(name, axis) for name, axis in found.axes.items()})


def _hash(module: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()
