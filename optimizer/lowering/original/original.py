"""The original of a program: what engines must equal, and how precisely it is known itself."""

from __future__ import annotations

import abc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from planish.optimizer.errors import BadInput, InternalError, OutOfResources
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint, loaded, open_checkpoint, quiet
from planish.optimizer.lowering.checkpoint.failures import told_as_bad_input
from planish.optimizer.lowering.components import rope
from planish.optimizer.lowering.components.calls import CALLS
from planish.optimizer.lowering.export.torch_export import to_torch
from planish.optimizer.lowering.original.greedy import continue_greedily
from planish.optimizer.lowering.original.offload import offloaded
from planish.optimizer.runtime.cases import Case, load_cases, save_cases, thin
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation, Prompt, load_continuations, save_continuations
from planish.optimizer.system.child_process import ChildProcess, Message, serve
from planish.optimizer.system.scratch import scratch_folder

_WHOLE_LIMIT = 128 << 20
"""Models with at most this many bytes of parameters are turned to fp64 whole, larger ones layer by layer."""


Cases = Mapping[str, Sequence[Case]]
"""Cases by component."""


@dataclass(frozen=True)
class Answers:
    """Outputs of the original by component and case, and again in higher precision for the first few of each."""

    outputs: Mapping[str, list[dict[str, np.ndarray]]]
    precise: Mapping[str, list[dict[str, np.ndarray]]] | None
    """None if the model does not allow another precision."""
    continuations: Sequence[GreedyContinuation] = ()
    """How it goes on after each prompt."""


class Original(abc.ABC):
    """Runs reference inputs through the model that came in."""

    description: str
    """How the reference outputs are made, for the manifest."""

    @abc.abstractmethod
    def answer(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Answers:
        """Outputs of every case, those of the first ``precise`` of each component again in higher precision.

        Each prompt is continued as well.
        """

    def start(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Callable[[], Answers]:
        """Begin to answer; the function that is returned gives the answers. Here both happen at once."""
        answers = self.answer(cases, precise, prompts)
        return lambda: answers


class TorchOriginal(Original):
    """A PyTorch module in eager mode."""

    description = "PyTorch eager, float32"

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._calls: dict[str, tuple[str, list[str]]] = {}

    def ask_for(self, component: str, call: str, outputs: Iterable[str]) -> None:
        """Say which call (of `calls.CALLS`) a component stands for, and which of its results count."""
        self._calls[component] = (call, list(outputs))

    def answer(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Answers:
        """Run every case in float32, and the first few in float64 unless the model's code insists on float32."""
        import torch

        module = self._load()
        rope.forget_lengths(module)
        places = [(name, index) for name, own in cases.items() for index in range(len(own))]
        calls = [partial(self._thinned, module, name, cases[name][index]) for name, index in places]
        writers = [partial(_continued, module, prompt, reorder_at) for prompt, reorder_at in prompts]
        results: list[Any] = _side_by_side(module, [*calls, *writers])
        outputs = _by_component(places, results)
        continued = results[len(calls) :]
        few = [(name, index) for name, index in places if index < precise]
        again = [partial(self._thinned, module, name, cases[name][index], torch.float64) for name, index in few]
        with _double_precision(module):
            try:
                return Answers(outputs, _by_component(few, _side_by_side(module, again)), continued)
            except (BadInput, OutOfResources):  # operands of two types: some code names float32
                return Answers(outputs, None, continued)

    def _thinned(self, module: Any, component: str, case: Case, dtype: Any = None) -> dict[str, np.ndarray]:
        return thin(case, self._call(module, component, case, dtype))

    def _call(self, module: Any, component: str, case: Case, dtype: Any = None) -> dict[str, np.ndarray]:
        import torch

        call, outputs = self._calls[component]
        feeds = to_torch(case)
        if dtype is not None:
            feeds = {k: v.to(dtype) if v.is_floating_point() else v for k, v in feeds.items()}
        with torch.no_grad(), quiet():
            shapes = {name: list(array.shape) for name, array in case.items()}
            what = f"the original model cannot run reference inputs of shapes {shapes}"
            with told_as_bad_input(what, None, "give inputs that it takes with --calibration"):
                results = CALLS[call](module, feeds)
        return {name: results[name].numpy() for name in outputs}


def _continued(module: Any, prompt: Case, reorder_at: int) -> GreedyContinuation:
    import torch

    what = "the original model cannot go on with a text"
    with torch.no_grad(), quiet(), told_as_bad_input(what, None):
        return continue_greedily(module, prompt, reorder_at)


def _side_by_side(module: Any, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all calls: together where weights must be read for each, else one after the other."""
    reader = getattr(module, "weight_reader", None)
    return [call() for call in calls] if reader is None else reader.turnstile.together(calls)


def _by_component(places: Sequence[tuple[str, int]], results: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name, _ in places}
    for (name, _), result in zip(places, results, strict=False):  # continuations come after them
        found[name].append(result)
    return found


class CheckpointOriginal(TorchOriginal):
    """A checkpoint as transformers loads it, in a process of its own: beside other work, and gone with its memory.

    The process starts at once and loads the checkpoint while this one traces it; it ends when this one does. How it
    shall be called is said later, in `ask_for`. Inputs and outputs are files: as parts of mapped files they need not
    stay in memory.
    """

    kind = "loaded"
    environment: ClassVar[Mapping[str, str]] = {}
    """Variables of the process."""

    def __init__(self, folder: Path, task: str, adapter: Path | None = None) -> None:
        super().__init__(lambda: _KINDS[self.kind](open_checkpoint(folder, task, adapter)))
        self._source = {"folder": str(folder), "task": task, "adapter": None if adapter is None else str(adapter)}
        scratch = ExitStack()
        self._scratch = scratch.enter_context(scratch_folder())
        self._child: ChildProcess | None = None
        self._end = weakref.finalize(self, scratch.close)
        """Ends the process, if it lives, and removes its folder; called when nobody needs the original any more."""
        self._stack = scratch
        self._begin()

    def _begin(self) -> None:
        """Start the process; whether it could load the checkpoint is asked later."""
        child = ChildProcess.start(
            "planish.optimizer.lowering.original.original",
            "the process of the original model",
            environment={**os.environ, **self.environment},
        )
        self._child = self._stack.enter_context(child)
        child.send("load", kind=self.kind, **self._source)

    def start(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Callable[[], Answers]:
        """Hand the cases to the process."""
        folder, child = self._scratch, self._child
        if child is None:
            raise InternalError("the process of the original was not started")
        for name, of_component in cases.items():
            save_cases(of_component, folder / f"{name}.inputs.safetensors")
        save_cases([prompt for prompt, _ in prompts], folder / "prompts.safetensors")
        swaps = [reorder_at for _, reorder_at in prompts]
        child.send("answer", folder=str(folder), precise=precise, calls=self._calls, swaps=swaps)

        def finish() -> Answers:
            try:
                child.receive()  # it has loaded the checkpoint
                has_precise = child.receive().values["has_precise"]
                return _load_answers(folder, list(cases), has_precise=has_precise)
            finally:
                self._end()

        return finish


class OffloadedOriginal(CheckpointOriginal):
    """A checkpoint whose weights are read as the model's code asks for them, in a process that starts when it is asked.

    Until then nothing is done and no memory taken.
    """

    kind = "offloaded"
    description = "PyTorch eager, float32, each weight read from the checkpoint when it is used"
    environment: ClassVar[Mapping[str, str]] = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    """glibc gives memory back at once: heaps of many threads full of holes grew by 40 MB a layer, this by 14."""

    def _begin(self) -> None:
        """Not yet."""

    def start(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Callable[[], Answers]:
        """Start the process and hand the cases to it."""
        super()._begin()
        return super().start(cases, precise, prompts)


_KINDS: Mapping[str, Callable[[Checkpoint], Any]] = {"loaded": loaded, "offloaded": offloaded}
"""Ways to come by the module of a checkpoint."""


def _load_answers(folder: Path, components: Sequence[str], *, has_precise: bool) -> Answers:
    outputs = {name: load_cases(folder / f"{name}.outputs.safetensors") for name in components}
    continuations = load_continuations(folder / "continuations.safetensors")
    if not has_precise:
        return Answers(outputs, None, continuations)
    precise = {name: load_cases(folder / f"{name}.precise.safetensors") for name in components}
    return Answers(outputs, precise, continuations)


def _save_answers(answers: Answers, folder: Path) -> None:
    for kind, by_component in (("outputs", answers.outputs), ("precise", answers.precise or {})):
        for name, of_component in by_component.items():
            save_cases(of_component, folder / f"{name}.{kind}.safetensors")
    save_continuations(answers.continuations, folder / "continuations.safetensors")


@contextmanager
def _double_precision(module: Any) -> Iterator[None]:
    """Compute in float64 inside: the whole module if it is small, else each layer only while it runs."""
    import torch

    size = sum(parameter.nbytes for parameter in module.parameters() if not parameter.is_meta)
    default = torch.get_default_dtype()
    kept = {id(tensor): tensor.data for tensor in [*module.parameters(), *module.buffers()]}
    torch.set_default_dtype(torch.float64)
    handles = [] if size <= _WHOLE_LIMIT else _widen_as_they_run(module, kept)
    try:
        if size <= _WHOLE_LIMIT:
            module.double()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = kept.get(id(tensor), tensor.data)
        torch.set_default_dtype(default)


def _widen_as_they_run(module: Any, kept: Mapping[int, Any]) -> list[Any]:
    def widen(layer: Any, _: Any) -> None:
        for tensor in [*layer._parameters.values(), *layer._buffers.values()]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.double()

    def restore(layer: Any, _: Any, __: Any) -> None:
        for tensor in [*layer._parameters.values(), *layer._buffers.values()]:
            if tensor is not None and id(tensor) in kept:
                tensor.data = kept[id(tensor)]

    layers = list(module.modules())
    before = [layer.register_forward_pre_hook(widen) for layer in layers]
    return before + [layer.register_forward_hook(restore) for layer in layers]


class _OriginalServer:
    """Answers the requests of a `CheckpointOriginal` in its process."""

    def __init__(self) -> None:
        self._module: Any = None

    def answer(self, request: Message) -> Message:
        """The reply to one request."""
        values = request.values
        if request.name == "load":
            adapter = None if values["adapter"] is None else Path(values["adapter"])
            checkpoint = open_checkpoint(Path(values["folder"]), values["task"], adapter)
            self._module = _KINDS[values["kind"]](checkpoint)
            return Message("loaded")
        original = TorchOriginal(lambda: self._module)
        for name, (call, outputs) in values["calls"].items():
            original.ask_for(name, call, outputs)
        folder = Path(values["folder"])
        cases = {name: load_cases(folder / f"{name}.inputs.safetensors") for name in values["calls"]}
        prompts = list(zip(load_cases(folder / "prompts.safetensors"), values["swaps"], strict=True))
        answers = original.answer(cases, values["precise"], prompts)
        _save_answers(answers, folder)
        return Message("answered", {"has_precise": all(name in (answers.precise or {}) for name in cases)})


def main() -> None:
    """Hold an original in this process, and answer requests for it."""
    serve(_OriginalServer().answer)
