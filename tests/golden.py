"""Golden tests of passes: graphs as text before and after a pipeline.

A file holds cases. Each is verified, run before and after, and compared with its `[out]` block::

    [case name]
    g (float[2,3] x) => (float[2,3] r) { r = Identity (x) }      the graph, in the text form of ONNX
    [opset] 13                                                   if it is not 23
    [pipeline] eliminate-identities                              if it is not the pass that the file is named after
    [refused] part of a reason                                   each refusal that must be recorded, in any order
    [tolerance] 0.05                                             if outputs may differ by more than rounding
    [out]
    …

`pytest tests/passes/test_golden.py --update-golden` rewrites the `[out]` blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import onnx.reference
import onnx.shape_inference
import onnx_ir as ir

from planish.optimizer import Pipeline
from planish.optimizer.calibration.collect import Calibrate
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.pass_base import Refusal
from planish.optimizer.ir.graph import graphs_of
from planish.optimizer.ir.kv_cache import CACHE_SCALE, is_cache_scale
from planish.optimizer.ir.program import Role, Signature, TensorSpec
from planish.optimizer.pipeline.instruments import VerifyEach

FOLDER = Path(__file__).parent / "data" / "passes"
_SIZES = {"batch": 2, "sequence": 5, "N": 3, "M": 4, "past": 3, "total": 8, "heads": 2, "size": 4}


@dataclass
class Case:
    """One golden case and where it stands."""

    path: Path
    name: str
    graph: str
    settings: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    out: str = ""

    @property
    def pipeline(self) -> str:
        """The text of the pipeline; the pass that the file is named after if none is given."""
        return self.settings.get("pipeline", self.path.stem)

    def model(self) -> ir.Model:
        """The graph before the pipeline, its shapes inferred as those of lowered models are."""
        opset = self.settings.get("opset", "23")
        header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
        model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(header + self.graph)))
        return model


def read_cases(folder: Path = FOLDER) -> Iterator[Case]:
    """All cases of all files, in order."""
    for path in sorted(folder.glob("*.test")):
        for block in re.split(r"^(?=\[case )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            yield _read_case(path, block)


def _read_case(path: Path, block: str) -> Case:
    header, *lines = block.rstrip().splitlines()
    case = Case(path, header.removeprefix("[case ").rstrip("]"), "")
    section = "graph"
    for line in lines:
        match = re.match(r"\[(\w+)\] ?(.*)$", line)
        if match is None:
            setattr(case, section, getattr(case, section) + line + "\n")
        elif match.group(1) == "out":
            section = "out"
        elif match.group(1) == "refused":
            case.refused.append(match.group(2))
        else:
            case.settings[match.group(1)] = match.group(2)
    return case


def run(case: Case) -> tuple[ir.Model, list[Refusal]]:
    """The graph after the pipeline, and everything that was refused."""
    model = case.model()
    signature = Signature(tuple(map(_spec, model.graph.inputs)), ())
    feeds = _feeds(model, np.random.default_rng(0))
    observe = Calibrate(signature, lambda: [feeds], registry.backend("onnxruntime").load)
    outcome = Pipeline.parse(case.pipeline).run(model, [observe, VerifyEach()])
    return outcome.model, [refusal for report in outcome.reports for refusal in report.refusals]


def _spec(value: ir.Value) -> TensorSpec:
    return TensorSpec(value.name or "", value.dtype or ir.DataType.FLOAT, (), Role.VALUES)


def text_of(model: ir.Model) -> str:
    """The graph as text, without header and names of nodes, one node a line."""
    for graph in graphs_of(model):
        for node in graph:
            node.name = None
            node.metadata_props.clear()
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    text = onnx.printer.to_text(proto)
    text = text[text.index(">") + 1 :].strip()
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def outputs(model: ir.Model, seed: int = 0) -> list[np.ndarray]:
    """What the graph computes on inputs drawn with a seed, by the reference evaluator or, if it must, ONNX Runtime."""
    feeds = _feeds(model, np.random.default_rng(seed))
    foreign = any(node.domain not in ("", "ai.onnx") for graph in graphs_of(model) for node in graph)
    names = [value.name or "" for value in model.graph.outputs if not is_cache_scale(value.name or "")]
    if foreign or len(feeds) < len(model.graph.inputs) or len(names) < len(model.graph.outputs):
        found = registry.backend("onnxruntime").load(model).run(feeds)
        return [found[name] for name in names]
    return list(onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds))


def _feeds(model: ir.Model, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Arrays for all inputs; a cache in 8 bits is given in float, as it was before."""
    scales = {value.name for value in model.graph.inputs if is_cache_scale(value.name or "")}
    given = [value for value in model.graph.inputs if value.name not in scales]
    return {
        value.name or "": _draw(
            value, generator, ir.DataType.FLOAT if f"{value.name}{CACHE_SCALE}" in scales else value.dtype
        )
        for value in given
    }


def _draw(value: ir.Value, generator: np.random.Generator, kind: ir.DataType | None) -> np.ndarray:
    dims = () if value.shape is None else value.shape
    shape = [dim if isinstance(dim, int) else _SIZES[dim.value or ""] for dim in dims]
    dtype = (kind or ir.DataType.FLOAT).numpy()
    if dtype == np.bool_:
        return generator.random(shape) < 0.7
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, 3, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def update(cases: list[Case]) -> None:
    """Rewrite each file with the graphs that its cases give now."""
    for path in {case.path for case in cases}:
        path.write_text("\n".join(_text(case) for case in cases if case.path == path), encoding="utf-8")


def _text(case: Case) -> str:
    settings = "".join(f"[{key}] {value}\n" for key, value in case.settings.items())
    refused = "".join(f"[refused] {reason}\n" for reason in case.refused)
    return f"[case {case.name}]\n{case.graph}{settings}{refused}[out]\n{text_of(run(case)[0])}"
