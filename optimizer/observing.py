"""What passes want to know of activations before they run, gathered over calibration batches in bounded memory.

A pass wishes for observations of values (`Pass.wishes`). `Observe` runs the model in float, as it stands before that
pass, batch by batch, and adds what it sees to an accumulator for each value, which then lies in the value's `meta`.
Only one batch and the accumulators are in memory: neither grows with the number of batches, and accumulators that are
bulky are gathered a few at a time and forgotten once the pass has made use of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.optimizer.backend import Arrays, Engine
from planish.optimizer.base import Pass, Wish
from planish.optimizer.graph import forget_unread, width_of
from planish.optimizer.instruments import Instrument, Step
from planish.optimizer.program import SUM, Signature, TensorSpec

Load = Callable[[ir.Model], Engine]
_LIMIT = 1 << 29
"""Bytes of accumulators that are filled in one run over the batches."""


def activations(
    model: ir.Model, names: Sequence[str], inputs: Iterable[Arrays], load: Load, mask: TensorSpec | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """For each input, the values called ``names`` as float rows, shape (rows, width).

    Rows of padding are left out of values that run along ``mask``, as far as their symbolic shapes say so.
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
    """Remove what is behind the outputs. Whole operators only: one that stays keeps all that it gives."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    forget_unread(graph, graph.initializers.values())


def _runs_along(mask: TensorSpec, value: ir.Value) -> bool:
    """Whether texts and tokens are the first two axes of a value, as they are of a mask (or of its end)."""
    dims = [] if value.shape is None else [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
    if len(dims) < 3 or len(mask.shape) != 2 or dims[0] != mask.shape[0]:
        return False
    return dims[1] is not None and dims[1] in str(mask.shape[1]).split(SUM)


def _rows(array: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    found = np.asarray(array, np.float32)
    kept = found if counts is None else found[counts[:, -found.shape[1] :] != 0]
    return kept.reshape(-1, found.shape[-1] if found.ndim else 1)


@dataclass
class Observe(Instrument):
    """Before a pass runs, see what it wishes to know."""

    signature: Signature
    batches: Callable[[], Iterable[Arrays]]
    """The calibration data, each time from its beginning."""
    load: Load
    say: Callable[[str], None] = lambda _: None
    """Told what will be gathered and how much memory that takes, before it starts."""
    limit: int = _LIMIT
    asked: bool = field(default=False, init=False)
    """Whether any pass wished for anything."""
    _held: list[Wish] = field(default_factory=list, init=False)

    def before(self, step: Step) -> None:
        """Gather for the pass of this step."""
        self.gather(step.pass_, step.model)

    def after(self, step: Step) -> None:
        """Forget: what a changed model computes is something else. A value may stand in for one that was seen."""
        for wish in self._held:
            wish.value.meta.pop(wish.what.__name__, None)
        kinds = {wish.what.__name__ for wish in self._held}
        for value in (value for node in step.model.graph if kinds for value in node.outputs):
            for kind in kinds:
                value.meta.pop(kind, None)
        self._held.clear()

    def failed(self, step: Step, error: Exception) -> None:
        """Forget as well."""
        self.after(step)

    def gather(self, step: Pass, model: ir.Model) -> None:
        """See what ``step`` wishes, in as many runs over the batches as the limit of memory asks for."""
        wishes = [wish for wish in _distinct(step.wishes(model)) if _can_be_seen(wish.value, model.graph)]
        if not wishes:
            return
        self.asked = True
        groups = list(_grouped(wishes, self.limit))
        size = max(sum(map(size_of, group)) for group in groups)
        times = "once" if len(groups) == 1 else f"{len(groups)} times"
        self.say(f"{step.name}: {len(wishes)} observations, {size / 1e6:.1f} MB, data read {times}")
        for group in groups:
            self._see(model, group)
            step.digest(model)
            for wish in group:
                if wish.what.bulky:
                    wish.value.meta.pop(wish.what.__name__, None)

    def _see(self, model: ir.Model, wishes: Sequence[Wish]) -> None:
        made = [wish.what() for wish in wishes]
        names = sorted({wish.value.name or "" for wish in wishes})
        for rows in activations(model, names, self.batches(), self.load, self.signature.mask()):
            for wish, observation in zip(wishes, made, strict=True):
                observation.add(rows[wish.value.name or ""])
        for wish, observation in zip(wishes, made, strict=True):
            wish.value.meta[wish.what.__name__] = observation
        self._held += wishes


def _can_be_seen(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a value can be an output of the main graph: one of a subgraph cannot, and constants need no run."""
    return value.graph is graph and not value.is_initializer()


def _distinct(wishes: Sequence[Wish]) -> list[Wish]:
    found = {(wish.value.name, wish.what): wish for wish in wishes}
    return [found[key] for key in sorted(found, key=lambda key: (key[0] or "", key[1].__name__))]


def _grouped(wishes: Sequence[Wish], limit: int) -> Iterator[list[Wish]]:
    """As many at once as fit; one that does not fit by itself is gathered alone."""
    group: list[Wish] = []
    for wish in wishes:
        if group and sum(map(size_of, [*group, wish])) > limit:
            yield group
            group = []
        group.append(wish)
    yield group


def size_of(wish: Wish) -> int:
    """Bytes of the accumulator for a wish."""
    return wish.what.size(width_of(wish.value))
