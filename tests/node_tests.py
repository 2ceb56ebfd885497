"""ONNX's own backend tests through our pipelines: what ONNX Runtime computes alone, it must compute after them.

`python -m tests.node_tests` runs every case and writes `docs/node-tests.md`. The cases come with the package `onnx`,
which makes most of them when they are asked for. Each is run as it is written, and with its inputs as constants, so
that the folder of constants is held against ONNX Runtime as well.
"""

from __future__ import annotations

import re
import sys
import unittest
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner
from onnxruntime.backend.backend import OnnxRuntimeBackend

from planish.backends import BACKENDS
from planish.optimizer import Pipeline
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import VerifyEach, text_of

PAGE = Path(__file__).parents[1] / "docs" / "node-tests.md"
ON_DISK = ("simple", "pytorch-converted", "pytorch-operator")
QUIET: dict[str, Any] = {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "log_severity_level": 4}
FORMS = ("as written", "inputs as constants")

Outcome = Literal["unchanged", "within tolerance", "skipped", "failed"]

REASONS = {
    "ValidateOpsetForDomain|Model::Model": "its opset or IR version is newer than the runtime",
    "NOT_IMPLEMENTED|not a registered function": "the runtime does not have the operator, or not for this type",
    "Numpy_type|No corresponding Numpy type": "it has a type that numpy cannot carry into the runtime, or out of it",
    "INVALID_GRAPH|Type Error": "the runtime holds the graph for invalid",
    "^AssertionError|^TypeError": "the runtime itself misses the expected outputs",
    "FAIL|RUNTIME_EXCEPTION|INVALID_ARGUMENT": "the runtime fails while it prepares or runs it",
    "^no constants": "it has no inputs that can be constants",
}
"""What the runtime says where it does not pass a case alone, and the reason that is counted."""


@dataclass(frozen=True)
class Case:
    """A graph, what goes in, and what must come out."""

    name: str
    model: onnx.ModelProto
    data: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Verdict:
    """What became of one case in one form under one pipeline."""

    case: str
    form: str
    pipeline: str
    outcome: Outcome
    reason: str = ""


class PlanishBackend(OnnxRuntimeBackend):  # type: ignore[misc]
    """The interface that ONNX's tests are written for: optimize, then let ONNX Runtime do the rest."""

    @classmethod
    def prepare(cls, model: Any, device: str | None = None, **kwargs: Any) -> Any:
        if not isinstance(model, onnx.ModelProto):
            return super().prepare(model, device, **kwargs)
        pipeline = Pipeline.parse(kwargs.pop("pipeline"))
        outcome = pipeline.run(model, [VerifyEach()])
        once = text_of(outcome.model)
        again = pipeline.run(outcome.model.clone())
        changed = [report.name for report in again.reports if report.modified]
        if changed or text_of(again.model) != once:
            raise AssertionError(f"a second run is not idle: {changed or 'the text differs'}")
        return super().prepare(ir.to_proto(outcome.model), device, **kwargs)


def pipelines() -> dict[str, str]:
    """Text of the exact preset of each target -> the targets that have it."""
    found: dict[str, list[str]] = {}
    for target in BACKENDS:
        found.setdefault(presets.pipeline_text("exact", target), []).append(target)
    return {text: ", ".join(targets) for text, targets in found.items()}


@cache
def cases() -> tuple[Case, ...]:
    """Every case that needs no download, in order of their names."""
    with np.errstate(all="ignore"):
        made = [_made(test) for test in load_model_tests(kind="node")]
    stored = [_stored(test) for kind in ON_DISK for test in load_model_tests(kind=kind)]
    return tuple(sorted([*made, *stored], key=lambda case: case.name))


def _made(test: Any) -> Case:
    data = [([_array(x) for x in inputs], [_array(y) for y in outputs]) for inputs, outputs in test.data_sets]
    return Case(test.name, test.model, data, test.rtol, test.atol)


def _stored(test: Any) -> Case:
    folder = Path(test.model_dir)
    model = onnx.load(folder / "model.onnx")
    data = [
        tuple(
            [_read(part / f"{kind}_{index}.pb", value.type) for index, value in enumerate(values)
             if (part / f"{kind}_{index}.pb").exists()]
            for kind, values in (("input", model.graph.input), ("output", model.graph.output))
        )
        for part in sorted(folder.glob("test_data_set*"))
    ]  # fmt: skip
    return Case(test.name, model, [(inputs, outputs) for inputs, outputs in data], test.rtol, test.atol)


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    if kind.HasField("optional_type"):
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes()))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _array(value: Any) -> Any:
    """Tensors and numpy's scalars as arrays, anything else as it is."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def with_constants(case: Case) -> Case | None:
    """The case with its inputs in the graph; None if one of them is no tensor or there are none."""
    if len(case.data) != 1 or len(case.data[0][0]) != len(case.model.graph.input) or not case.data[0][0]:
        return None
    arrays = case.data[0][0]
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in arrays):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    weights = [onnx.numpy_helper.from_array(a, v.name) for a, v in zip(arrays, model.graph.input, strict=True)]
    del model.graph.input[:]
    model.ir_version = max(model.ir_version, 4)  # before, a constant had to be an input as well
    model.graph.initializer.extend(weights)
    return replace(case, model=model, data=[([], case.data[0][1])])


def judge(case: Case) -> Iterator[Verdict]:
    """Run a case in both forms, alone and after every pipeline; one that the runtime cannot do is optimized too."""
    for form in FORMS:
        shown = case if form == FORMS[0] else with_constants(case)
        alone, why = (None, "no constants") if shown is None else _attempt(shown, OnnxRuntimeBackend)
        for text, targets in pipelines().items():
            after, wrong = (None, "") if shown is None else _attempt(shown, PlanishBackend, pipeline=text)
            if alone is None:
                ours = _ours(wrong)
                yield Verdict(case.name, form, targets, "failed" if ours else "skipped", wrong if ours else why)
            elif after is None:
                yield Verdict(case.name, form, targets, "failed", wrong)
            else:
                yield Verdict(case.name, form, targets, "unchanged" if _same(alone, after) else "within tolerance")


def _ours(wrong: str) -> bool:
    """Whether it was a pass that failed, and not the runtime behind it."""
    return bool(wrong) and _reason(wrong) == wrong


def _attempt(case: Case, backend: type[OnnxRuntimeBackend], **options: Any) -> tuple[list[Any] | None, str]:
    """The outputs if they are as expected, else what was wrong, on one line."""
    try:
        prepared = backend.prepare(case.model, "CPU", **QUIET, **options)
        outputs = [list(prepared.run(list(inputs), log_severity_level=4)) for inputs, _ in case.data]
        for (_, expected), found in zip(case.data, outputs, strict=True):
            Runner.assert_similar_outputs(expected, found, case.rtol, case.atol)
    except (Exception, unittest.SkipTest) as error:  # noqa: BLE001 - whatever it is, it is the verdict
        return None, " ".join(f"{type(error).__name__} {error}".split())[:600]
    return outputs, ""


def _same(one: Any, other: Any) -> bool:
    """Equal bit by bit (NaN is NaN), also inside of sequences."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if not isinstance(one, np.ndarray):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(one.tolist() == other.tolist() if one.dtype == object else one.tobytes() == other.tobytes())


def _reason(text: str) -> str:
    return next((reason for pattern, reason in REASONS.items() if re.search(pattern, text)), text)


@dataclass
class Row:
    """Counts of one form under one pipeline."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


def count(verdicts: Iterable[Verdict]) -> dict[tuple[str, str], Row]:
    """Counts by form and pipeline."""
    rows: dict[tuple[str, str], Row] = {}
    for verdict in verdicts:
        row = rows.setdefault((verdict.form, verdict.pipeline), Row())
        row.counts[verdict.outcome] += 1
        if verdict.outcome == "skipped":
            row.reasons[_reason(verdict.reason)] += 1
    return rows


def page(rows: Mapping[tuple[str, str], Row]) -> str:
    """The page of the documentation."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime"))
    lines = [
        "# ONNX's node tests",
        "",
        "The backend tests that come with `onnx`, through the exact preset of each target, then run by ONNX Runtime. A case",
        "that ONNX Runtime passes alone must pass after the passes as well; a second run of a pipeline must change nothing.",
        "Cases that it does not pass alone go through the passes too, and no pass may break on them. In the second form the",
        "inputs are constants of the graph. `python -m tests.node_tests` writes this page.",
        "",
        f"With {versions}:",
        "",
        "| form | targets | run | bit for bit unchanged | changed within the tolerance of the case | failed | skipped |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (form, targets), row in rows.items():
        run = sum(row.counts.values()) - row.counts["skipped"]
        cells = [row.counts[outcome] for outcome in ("unchanged", "within tolerance", "failed", "skipped")]
        lines.append(f"| {form} | {targets} | {run} | {' | '.join(map(str, cells))} |")
    for form in FORMS:
        lines += ["", f"Skipped, {form}:", "", "| cases | reason |", "| --- | --- |"]
        reasons = next((row.reasons for (shown, _), row in rows.items() if shown == form), Counter())
        lines += [f"| {number} | {reason} |" for reason, number in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _judge_share(share: tuple[int, int]) -> list[Verdict]:
    onnxruntime.set_default_logger_severity(4)
    first, step = share
    return [verdict for case in cases()[first::step] for verdict in judge(case)]


def judge_all(workers: int = 2) -> list[Verdict]:
    """Every verdict, from several processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [v for share in pool.map(_judge_share, [(index, workers) for index in range(workers)]) for v in share]


def main() -> int:
    """Run everything, write the page, name what failed."""
    verdicts = judge_all()
    PAGE.write_text(page(count(verdicts)), encoding="utf-8")
    failed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    for verdict in failed:
        print(f"{verdict.case} ({verdict.form}, {verdict.pipeline}): {verdict.reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
