"""A folder for TensorRT: a graph that its parser reads, and the settings and the script of the build."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from planish.optimizer.errors import CheckFailed
from planish.optimizer.ir.graph import graphs_of, location_of, opset_of
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Signature

NEWEST_OPSET = 24
"""The newest opset that the parser of TensorRT 10.15 and 11.1 reads."""
_UNSUPPORTED = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
"""Standard operators that TensorRT's parser refuses (onnx-tensorrt, docs/operators.md)."""


def refuse_foreign(model: ir.Model) -> None:
    """CheckFailed if the graph has an operator that TensorRT's parser does not know, or a newer opset than it reads."""
    if opset_of(model) > NEWEST_OPSET:
        raise CheckFailed(f"TensorRT reads opset {NEWEST_OPSET} at most, the graph is written in {opset_of(model)}")
    for graph in graphs_of(model):
        for node in graph:
            if node.domain not in ("", "ai.onnx") or node.op_type in _UNSUPPORTED:
                raise CheckFailed(
                    f"TensorRT has no operator {node.domain or 'ONNX'}::{node.op_type}",
                    where=location_of(node),
                    advice="leave out the pass that wrote it for this target",
                )


def write_build(
    model_file: str, folder: Path, signature: Signature, batch: Sequence[int], sequence: Sequence[int]
) -> None:
    """Write `build.json` and `build.py`; ranges are smallest, most usual and largest sizes."""
    settings = {
        "onnx": model_file,
        "plan": "model.plan",
        "strongly_typed": True,
        "tf32": False,
        "decomposable_attention": True,
        "profiles": [_profile(signature, batch, sequence)],
    }
    (folder / "build.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    template = Path(__file__).with_name("build.py.in")
    (folder / "build.py").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def _profile(
    signature: Signature, batch: Sequence[int], sequence: Sequence[int]
) -> Mapping[str, Mapping[str, list[int]]]:
    """Shapes of each input at the smallest, most usual and largest sizes."""
    kinds = ("min", "opt", "max")
    ranges = {name: _range(signature, name, batch, sequence) for name in signature.axes}
    sizes = {
        kind: {name: axis.clamp(ranges[name][place]) for name, axis in signature.axes.items()}
        for place, kind in enumerate(kinds)
    }
    return {t.name: {kind: list(signature.shape_of(t, sizes[kind])) for kind in kinds} for t in signature.inputs}


def _range(signature: Signature, axis: str, batch: Sequence[int], sequence: Sequence[int]) -> Sequence[int]:
    """The range of an axis: ``batch`` if it leads the first input, else ``sequence``; a past may be empty."""
    if axis == PAST:
        return (0, *sequence[1:])
    leads = bool(signature.inputs) and signature.inputs[0].shape[:1] == (axis,)
    return batch if leads else sequence
