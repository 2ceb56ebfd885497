"""The original of a program: what engines must equal, and how precisely it is known itself."""

from __future__ import annotations

import abc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from planish.optimizer import errors
from planish.optimizer.errors import BadInput, InternalError, OutOfResources, PlanishError, is_no_room
from planish.optimizer.lowering.checkpoint.checkpoint import Checkpoint, loaded, open_checkpoint, quiet
from planish.optimizer.lowering.checkpoint.failures import told_as_bad_input
from planish.optimizer.lowering.components import rope
from planish.optimizer.lowering.components.calls import CALLS
from planish.optimizer.lowering.export.torch_export import to_torch
from planish.optimizer.lowering.original.greedy import continue_greedily
from planish.optimizer.lowering.original.offload import offloaded
from planish.optimizer.runtime.cases import Case, load_cases, save_cases, thin
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation, Prompt, load_continuations, save_continuations
from planish.optimizer.system import interrupts
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
        return thin(self._call(module, component, case, dtype))

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
    shall be called is said later, in `ask_for`.
    """

    kind = "loaded"
    environment: ClassVar[Mapping[str, str]] = {}
    """Variables of the process."""

    def __init__(self, folder: Path, task: str, adapter: Path | None = None) -> None:
        super().__init__(lambda: _KINDS[self.kind](open_checkpoint(folder, task, adapter)))
        self._where = [self.kind, str(folder), task, *([] if adapter is None else [str(adapter)])]
        scratch = ExitStack()
        self._scratch = scratch.enter_context(scratch_folder())
        self._child: subprocess.Popen[bytes] | None = None
        self._end = weakref.finalize(self, scratch.close)
        """Ends the process, if it lives, and removes its folder; called when nobody needs the original any more."""
        self._stack = scratch
        self._begin()

    def _begin(self) -> None:
        """Start the process."""
        with (self._scratch / "log").open("wb") as log:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "planish.optimizer.lowering.original.original",
                    str(self._scratch),
                    *self._where,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        self._stack.callback(_kill, self._child)

    def start(self, cases: Cases, precise: int, prompts: Sequence[Prompt] = ()) -> Callable[[], Answers]:
        """Hand the cases to the process."""
        folder, child = self._scratch, self._process()
        for name, own in cases.items():
            save_cases(own, folder / f"{name}.inputs.safetensors")
        save_cases([prompt for prompt, _ in prompts], folder / "prompts.safetensors")
        job = {"precise": precise, "calls": self._calls, "swaps": [reorder_at for _, reorder_at in prompts]}
        with suppress(BrokenPipeError):  # it died; `finish` says of what
            _stdin(child).write(f"{json.dumps(job)}\n".encode())
            _stdin(child).close()

        def finish() -> Answers:
            try:
                child.wait()
                return _collect(folder, child.returncode, list(cases))
            finally:
                self._end()

        return finish

    def _process(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise InternalError("the process of the original was not started")
        return self._child


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


def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    if child.stdin is not None:
        with suppress(BrokenPipeError):
            child.stdin.close()


def _stdin(child: subprocess.Popen[bytes]) -> IO[bytes]:
    if child.stdin is None:
        raise InternalError("the process of the original has no standard input")
    return child.stdin


def _collect(folder: Path, code: int, components: Sequence[str]) -> Answers:
    interrupts.check_ended(code)
    if code:
        raise _failure(folder, code)
    found = {name: load_cases(folder / f"{name}.outputs.safetensors") for name in components}
    continued = load_continuations(folder / "continuations.safetensors")
    if not all((folder / f"{name}.precise.safetensors").is_file() for name in components):
        return Answers(found, None, continued)
    precise = {name: load_cases(folder / f"{name}.precise.safetensors") for name in components}
    return Answers(found, precise, continued)


def _failure(folder: Path, code: int) -> PlanishError:
    complaint = folder / "error.json"
    if complaint.is_file():
        said = json.loads(complaint.read_text(encoding="utf-8"))
        kind: type[PlanishError] = getattr(errors, said.pop("kind"))
        return kind(**said)
    last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    kind = OutOfResources if code < 0 or code == OutOfResources.exit_code else InternalError
    return kind(f"the process that runs the original model ended with code {code}: {''.join(last)[:300]}")


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


def main() -> None:
    """What the process of a `CheckpointOriginal` does: load, wait for the word, answer, write."""
    scratch, kind, checkpoint, task, *adapters = sys.argv[1:]
    folder = Path(scratch)
    interrupts.end_with_parent()
    try:
        module = _KINDS[kind](open_checkpoint(Path(checkpoint), task, *map(Path, adapters)))
        line = sys.stdin.readline()
        if not line:
            return  # nobody waits for an answer any more
        job = json.loads(line)
        original = TorchOriginal(lambda: module)
        for name, (call, outputs) in job["calls"].items():
            original.ask_for(name, call, outputs)
        cases = {name: load_cases(folder / f"{name}.inputs.safetensors") for name in job["calls"]}
        prompts = zip(load_cases(folder / "prompts.safetensors"), job["swaps"], strict=True)
        _write(original.answer(cases, job["precise"], list(prompts)), folder)
    except OSError as error:
        if not is_no_room(error):
            raise
        print(f"there is no room to write its outputs ({error.strerror})", file=sys.stderr)
        sys.exit(OutOfResources.exit_code)
    except PlanishError as error:
        said = {"kind": type(error).__name__, "what": error.what, "where": error.where, "advice": error.advice}
        (folder / "error.json").write_text(json.dumps(said), encoding="utf-8")
        sys.exit(error.exit_code)


def _write(answers: Answers, folder: Path) -> None:
    for kind, found in (("outputs", answers.outputs), ("precise", answers.precise or {})):
        for name, own in found.items():
            save_cases(own, folder / f"{name}.{kind}.safetensors")
    save_continuations(answers.continuations, folder / "continuations.safetensors")


if __name__ == "__main__":
    main()
