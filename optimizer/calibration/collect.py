"""Statistics of activations that passes request, collected over calibration batches in bounded memory.

A pass requests statistics of values (`Pass.statistics`). `Calibrate` runs the model in float, as it stands before that
pass, batch by batch, and adds the rows to an observer for each value, which then lies in the value's `meta`. Only one
batch and the observers are in memory: neither grows with the number of batches, and large observers are collected a
few at a time and dropped once the pass has consumed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.interfaces.pass_base import Pass, StatisticRequest
from planish.optimizer.ir.edit import forget_unread
from planish.optimizer.ir.graph import width_of
from planish.optimizer.ir.program import SUM, Arrays, Signature, TensorSpec
from planish.optimizer.pipeline.instruments import Instrument, Step

Load = Callable[[ir.Model], Engine]
_LIMIT = 1 << 29
"""Bytes of accumulators that are filled in one run over the batches."""


def activations(
    model: ir.Model, names: Sequence[str], inputs: Iterable[Arrays], load: Load, mask: TensorSpec | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """For each input, the values called ``names`` as float rows, shape (rows, width).

    Padded rows are omitted for values that have the axes of ``mask`` by their symbolic shapes.
    """
    probe = model.clone()
    values = {value.name: value for node in probe.graph for value in node.outputs}
    given = {value.name: value for value in probe.graph.inputs}
    padded = {name for name in names if mask is not None and _runs_along(mask, (values | given)[name])}
    probe.graph.outputs[:] = [values[name] for name in names if name in values]
    _cut_off(probe.graph)
    engine = load(probe) if probe.graph.outputs else None
    for case in inputs:
        results = {} if engine is None else engine.run(case)
        counts = None if mask is None else case.get(mask.name)
        yield {
            name: _rows(case[name] if name in given else results[name], counts if name in padded else None)
            for name in names
        }


def _cut_off(graph: ir.Graph) -> None:
    """Remove the nodes that no output depends on."""
    # Reverse order removes the readers of a node before the node itself.
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    forget_unread(graph, graph.initializers.values())


def _runs_along(mask: TensorSpec, value: ir.Value) -> bool:
    """True if batch and tokens, the axes of the mask or of its end, are the first two axes of a value."""
    dims = [] if value.shape is None else [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
    if len(dims) < 3 or len(mask.shape) != 2 or dims[0] != mask.shape[0]:
        return False
    return dims[1] is not None and dims[1] in str(mask.shape[1]).split(SUM)


def _rows(array: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    rows = np.asarray(array, np.float32)
    # The mask may cover past and new tokens; values have the new tokens only, at its end.
    kept = rows if counts is None else rows[counts[:, -rows.shape[1] :] != 0]
    return kept.reshape(-1, rows.shape[-1] if rows.ndim else 1)


@dataclass
class Calibrate(Instrument):
    """Collect the statistics that each pass requests before it runs."""

    signature: Signature
    batches: Callable[[], Iterable[Arrays]]
    """Function that yields the calibration data from the beginning."""
    load: Load
    say: Callable[[str], None] = lambda _: None
    """Function for a message on the statistics and their memory, before they are collected."""
    limit: int = _LIMIT
    asked: bool = field(default=False, init=False)
    """True if a pass requested statistics."""
    _held: list[StatisticRequest] = field(default_factory=list, init=False)

    def before(self, step: Step) -> None:
        """Collect the statistics for the pass of this step."""
        self.gather(step.pass_, step.model)

    def after(self, step: Step) -> None:
        """Drop all statistics, since the values of a changed model differ. Replacements of values carry copies of
        them."""
        for request in self._held:
            request.value.meta.pop(request.what.__name__, None)
        kinds = {request.what.__name__ for request in self._held}
        for value in (value for node in step.model.graph if kinds for value in node.outputs):
            for kind in kinds:
                value.meta.pop(kind, None)
        self._held.clear()

    def failed(self, step: Step, error: Exception) -> None:
        """Drop all statistics."""
        self.after(step)

    def gather(self, step: Pass, model: ir.Model) -> None:
        """Collect the statistics that ``step`` requests, in as many runs over the data as the memory limit requires."""
        requests = [
            request for request in _distinct(step.statistics(model)) if _can_be_seen(request.value, model.graph)
        ]
        if not requests:
            return
        self.asked = True
        groups = list(_grouped(requests, self.limit))
        size = max(sum(map(size_of, group)) for group in groups)
        times = "once" if len(groups) == 1 else f"{len(groups)} times"
        self.say(f"{step.name}: {len(requests)} observations, {size / 1e6:.1f} MB, data read {times}")
        for group in groups:
            self._see(model, group)
            step.consume(model)
            for request in group:
                # A consumed Gram matrix may be hundreds of megabytes; small ones stay until the pass has run.
                if request.what.bulky:
                    request.value.meta.pop(request.what.__name__, None)

    def _see(self, model: ir.Model, requests: Sequence[StatisticRequest]) -> None:
        observers = [request.what() for request in requests]
        names = sorted({request.value.name or "" for request in requests})
        for rows in activations(model, names, self.batches(), self.load, self.signature.mask()):
            for request, observer in zip(requests, observers, strict=True):
                observer.add(rows[request.value.name or ""])
        for request, observer in zip(requests, observers, strict=True):
            request.value.meta[request.what.__name__] = observer
        self._held += requests


def _can_be_seen(value: ir.Value, graph: ir.Graph) -> bool:
    """True if a value can be an output of the main graph; values of subgraphs and constants cannot."""
    return value.graph is graph and not value.is_initializer()


def _distinct(statistics: Sequence[StatisticRequest]) -> list[StatisticRequest]:
    by_key = {(request.value.name, request.what): request for request in statistics}
    # Sorted, so that grouping, and with it the result of a locked build, does not depend on graph order.
    return [by_key[key] for key in sorted(by_key, key=lambda key: (key[0] or "", key[1].__name__))]


def _grouped(statistics: Sequence[StatisticRequest], limit: int) -> Iterator[list[StatisticRequest]]:
    """Groups of requests that fit the limit; a request that exceeds it is a group by itself."""
    group: list[StatisticRequest] = []
    for request in statistics:
        if group and sum(map(size_of, [*group, request])) > limit:
            yield group
            group = []
        group.append(request)
    yield group


def size_of(request: StatisticRequest) -> int:
    """Bytes of the observer of a request."""
    return request.what.size(width_of(request.value))
