"""Tuning table: measured latencies of operator forms for each target, cached in a file.

A pass declares tuning queries for a graph: which value of an option is fastest at the sizes of that graph. Each query
is a small graph of one operator and its surroundings, which the pass rewrites into every form. The forms are timed in
alternation, and the latencies are stored by target, library version and instruction set. The selected value becomes an
option in the text of the pass, so that a lock reproduces it without the table.
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
"""Time limit of one query."""
_NO_BORDER = {"model": Signature((), ())}


class Latency(BaseModel):
    """One form: its median latency in milliseconds, and its speed-up over the first form with the 95 % interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    median_ms: float
    speedup: float
    low: float
    high: float


class Table(BaseModel):
    """All entries, by host, query and form."""

    model_config = ConfigDict(extra="forbid")
    hosts: dict[str, dict[str, dict[str, Latency]]] = {}


def host_of(target: Backend) -> str:
    """Everything on which a latency depends besides the form: target and options, library, instruction set, cores."""
    library = f"{target.distribution} {library_version(target.distribution)}"
    return f"{target}, {library}, {instruction_set()}, {cores()} cores"


@dataclass
class Profile:
    """The entries of one target on this machine; missing ones are measured on demand."""

    target: Backend
    place: Path
    """The file of the table; created if it is missing."""
    used: dict[str, dict[str, Latency]] = field(default_factory=dict)
    """The entries used so far."""

    def latencies(self, step: Pass, question: TuningQuery) -> Mapping[str, Latency]:
        """The latency of each form of a query; the first form is the baseline."""
        key = f"{step.name} {question.option}: {question.about}"
        if key not in self.used:
            table = _read(self.place)
            entries = table.hosts.setdefault(host_of(self.target), {})
            # An entry of an older version may have other forms; then all are timed again, in one run.
            if entries.get(key, {}).keys() != set(map(str, question.values)):
                entries[key] = _measure(self.target, step, question)
                _write(self.place, table)
            self.used[key] = entries[key]
        return self.used[key]

    def described(self) -> dict[str, Any]:
        """The used entries, as they are stored in the file."""
        return {
            key: {value: latency.model_dump() for value, latency in forms.items()} for key, forms in self.used.items()
        }

    def best(self, step: Pass, questions: Sequence[TuningQuery]) -> object:
        """The option value that is fastest over several queries.

        The first value, unless the whole interval of another is faster.
        """
        values = questions[0].values
        latencies = [self.latencies(step, question) for question in questions]
        # Lower ends are multiplied over all queries: a gain at one size must outweigh a loss at another.
        sure = [value for value in values[1:] if math.prod(forms[str(value)].low for forms in latencies) > 1]
        return max(
            sure, key=lambda value: math.prod(forms[str(value)].speedup for forms in latencies), default=values[0]
        )


def _read(place: Path) -> Table:
    """The table in a file; an empty one if it is missing. BadInput for other content."""
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
    """Rewrite the query's graph into every form, and time the forms in alternation."""
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
    """Random numbers near zero for float inputs, ones for all others."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for value in graph().graph.inputs:
        dims = [dim for dim in value.shape or () if isinstance(dim, int)]
        dtype = np.dtype((value.dtype or ir.DataType.FLOAT).numpy())
        real = np.issubdtype(dtype, np.floating)
        arrays[value.name or ""] = (rng.standard_normal(dims) if real else np.ones(dims)).astype(dtype)
    return arrays


def _latency(timing: Timing) -> Latency:
    # Four digits: the table is text that people review, and more digits are noise.
    short = {name: float(f"{getattr(timing, name):.4g}") for name in Latency.model_fields}
    return Latency(**short)
