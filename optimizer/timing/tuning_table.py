"""What a target runs fast: the forms that a pass can choose among, timed on this machine once and kept.

A pass asks questions about a graph: which value of an option is faster at the sizes that it finds there. Each is a
small graph of one operator and its surroundings, which the pass itself writes in every form. A question is answered by
timing the forms in alternation, in seconds, and the answer is kept in a file beside those of other targets, libraries
and instruction sets. What is chosen stands as an option in the text of the pass: a lock repeats it without a profile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, ValidationError

from planish.optimizer.errors import BadInput
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Pass, TuningQuery
from planish.optimizer.ir.program import Arrays, Program, Provenance, Signature
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.system.machine import cores, instruction_set, library_version
from planish.optimizer.system.scratch import scratch_folder
from planish.optimizer.system.staging import staged_file
from planish.optimizer.timing.interleaved import Timing, time_against_first

_SECONDS = 6.0
"""Longest time for one question."""
_NO_BORDER = {"model": Signature((), ())}


class Latency(BaseModel):
    """One form: its median in milliseconds, and how many times as fast as the first form it is, at 95 %."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    median_ms: float
    speedup: float
    low: float
    high: float


class Table(BaseModel):
    """Every answer, by host, question and form."""

    model_config = ConfigDict(extra="forbid")
    hosts: dict[str, dict[str, dict[str, Latency]]] = {}


def host_of(target: Backend) -> str:
    """All that a latency depends on beside the form: target and options, library, instruction set, cores."""
    library = f"{target.distribution} {library_version(target.distribution)}"
    return f"{target}, {library}, {instruction_set()}, {cores()} cores"


@dataclass
class Profile:
    """Answers about one target on this machine; what is not known yet is measured when it is asked."""

    target: Backend
    place: Path
    """The file that holds the answers; made if it is not there."""
    used: dict[str, dict[str, Latency]] = field(default_factory=dict)
    """The answers that were asked for so far."""

    def latencies(self, step: Pass, question: TuningQuery) -> Mapping[str, Latency]:
        """How fast each form of a question is; the first is what the others are compared with."""
        key = f"{step.name} {question.option}: {question.about}"
        if key not in self.used:
            table = _read(self.place)
            known = table.hosts.setdefault(host_of(self.target), {})
            if known.get(key, {}).keys() != set(map(str, question.values)):
                known[key] = _measure(self.target, step, question)
                _write(self.place, table)
            self.used[key] = known[key]
        return self.used[key]

    def described(self) -> dict[str, Any]:
        """The answers that were asked for, as they stand in the file."""
        return {key: {value: one.model_dump() for value, one in own.items()} for key, own in self.used.items()}

    def best(self, step: Pass, questions: Sequence[TuningQuery]) -> object:
        """The value of an option that is fastest over several questions about it.

        The first, unless another is faster with its whole interval.
        """
        values = questions[0].values
        found = [self.latencies(step, question) for question in questions]
        sure = [value for value in values[1:] if math.prod(one[str(value)].low for one in found) > 1]
        return max(sure, key=lambda value: math.prod(one[str(value)].speedup for one in found), default=values[0])


def _read(place: Path) -> Table:
    """The table in a file; an empty one if there is none. BadInput if the file is something else."""
    if not place.is_file():
        return Table()
    try:
        return Table.model_validate_json(place.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise BadInput("this is not a profile", where=place, advice="remove it: it is measured again") from error


def _write(place: Path, table: Table) -> None:
    with staged_file(place) as path:
        path.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _measure(target: Backend, step: Pass, question: TuningQuery) -> dict[str, Latency]:
    """Write the question's graph in every form and time them in alternation."""
    with scratch_folder() as scratch:
        engines = []
        for number, value in enumerate(question.values):
            place = scratch / str(number)
            place.mkdir()
            model = question.graph()
            replace(step, **{question.option: value})(model)
            target.emit(Program({"model": model}, _NO_BORDER, "", Provenance("onnx", step.name)), place)
            engines.append(EngineRef(str(target), place))
        timings = time_against_first(engines, [_inputs(question.graph)] * len(engines), seconds=_SECONDS)
    return {str(value): _latency(timing) for value, timing in zip(question.values, timings, strict=True)}


def _inputs(graph: Callable[[], ir.Model]) -> Arrays:
    """Real numbers near zero, and ones for everything else."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for value in graph().graph.inputs:
        dims = [dim for dim in value.shape or () if isinstance(dim, int)]
        dtype = np.dtype((value.dtype or ir.DataType.FLOAT).numpy())
        real = np.issubdtype(dtype, np.floating)
        made[value.name or ""] = (rng.standard_normal(dims) if real else np.ones(dims)).astype(dtype)
    return made


def _latency(timing: Timing) -> Latency:
    short = {name: float(f"{getattr(timing, name):.4g}") for name in Latency.model_fields}
    return Latency(**short)
