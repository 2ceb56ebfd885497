"""Running an ONNX file that nobody vouches for: in a process that gets so much memory and time, and no more.

A file of 300 bytes can ask for all memory (`ConstantOfShape`) or all time (`Loop`), and runtimes also crash (a group of
no heads divides by zero). So a file gets as much memory and time as its weights and known sizes account for, and a base
on top; beyond that OutOfResources is raised. A file of few weights runs in a fork of this process, in milliseconds; a
larger one costs the start of a process. Its size is what the standard's shape inference finds, which believes nothing
that the file declares; if that finds a size for every value, and sizes and work stay below `SMALL_BYTES` and
`SMALL_WORK`, the file is small: where such a file does not come to an end, the fork is to blame.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.optimizer.errors import BadInput, CheckFailed, OutOfResources
from planish.optimizer.interfaces import registry
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.graph import subgraphs_of, weight_bytes
from planish.optimizer.ir.shape_inference import follows_few, quiet_libraries
from planish.optimizer.ir.weightless import without_weights
from planish.optimizer.runtime.cases import Case, load_cases, save_cases, thin
from planish.optimizer.system.child_process import Channel, ChildProcess, Message, parent_channel
from planish.optimizer.system.machine import available_memory, limit_memory
from planish.optimizer.system.scratch import scratch_folder

SMALL_BYTES = 64 << 20
"""Of all values and weights of a small graph, and of the weights of one that runs in a fork."""
SMALL_WORK = 10_000_000_000
"""Multiplications of such a graph at most: entries of each result times those of the operator's largest input."""
_BASE_BYTES = 2 << 30
_BASE_SECONDS = 10.0
_IMPORT_SECONDS = 120.0
"""For importing ONNX Runtime, which takes one on an idle machine."""
_BYTES_A_SECOND = 1 << 20
"""Weights and values that are surely worked through in a second, on a slow and busy machine."""
_WEIGHT_COPIES = 8
_VALUE_COPIES = 4
"""How often a value is held at once: by the runtime, in its answer, by us, and while it is compared."""
_FREE_BYTES = 3 << 30
"""Of the copies of one value, for a file of no weights: who has little may not ask for much."""
_CHANGED = 1e-2
"""Relative difference that another order of summation does not explain."""
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "std::bad_array_new_length")
"""The message of ONNX Runtime 1.31, in an error of no other kind, when memory ran out."""
_INPUTS, _OUTPUTS, _REORDERED = "inputs.safetensors", "outputs.safetensors", "reordered.safetensors"
_OPENED, _ANSWERED, _FINISHED = "opened", "answered", "finished"
"""Messages of the process: the runtime has opened the graph; the outputs are written; so are those with the runtime's
optimizations, or a note says why not."""
_SUBJECT = "the process that runs this file"
_ADVICE = "leave the comparison out (--no-check, --reference none), or give it smaller axes"


@dataclass(frozen=True)
class Run:
    """Outputs of every case, those of the first few again with the runtime's optimizations, and a note on these."""

    outputs: list[dict[str, np.ndarray]]
    reordered: list[dict[str, np.ndarray]] | None
    note: str | None = None
    """The reason not to trust the runtime's optimizations with this file."""


@dataclass(frozen=True)
class Size:
    """How large a graph is at given inputs."""

    bytes: int
    """Of its weights and of all values whose size is known."""
    largest: int
    """Bytes of its largest value."""
    work: int
    complete: bool
    """True if the size of every value is known, and no node holds a graph."""

    @property
    def small(self) -> bool:
        """True if a run is surely short and takes little memory."""
        return self.complete and self.bytes <= SMALL_BYTES and self.work <= SMALL_WORK


@dataclass(frozen=True)
class Limits:
    """The limits of the process of a file."""

    memory: int
    """Bytes beyond what it has when it begins."""
    seconds: float

    def expired(self, path: Path) -> OutOfResources:
        """The error for a file that takes longer."""
        return OutOfResources(f"running this file takes longer than {self.seconds:.0f} s", where=path, advice=_ADVICE)


def run(path: Path, cases: Sequence[Case], precise: int) -> Run:
    """Run every case as the file is written, and the first ``precise`` again with the runtime's own optimizations.

    BadInput if ONNX Runtime refuses the file, OutOfResources if it needs more memory or time than it accounts for.
    """
    model = _repaired(path)
    sizes = [size_at(model, case) for case in cases]
    weights, largest = weight_bytes(model), max(size.largest for size in sizes)
    most = _BASE_BYTES + _WEIGHT_COPIES * weights + 2 * max(size.bytes for size in sizes)
    available = available_memory()
    fits = _VALUE_COPIES * largest <= min(available, _FREE_BYTES + _WEIGHT_COPIES * weights)
    seconds = _BASE_SECONDS + sum(size.bytes for size in sizes) / _BYTES_A_SECOND
    limits = Limits(min(most, available), seconds)
    small = all(size.small for size in sizes)
    if small or (weights <= SMALL_BYTES and follows_few(model)):
        # a file that is refused is refused when it is loaded, mostly: that comes before what its sizes say
        answered = _run_forked(path, model, cases if fits else (), precise, limits, small)
        if answered is not None and fits:
            return answered
    if not fits:
        raise OutOfResources(f"a value of this graph has {largest} bytes", where=path, advice=_ADVICE)
    return _run_confined(path, cases, precise, limits)


def size_at(model: ir.Model, case: Case) -> Size:
    """How large a graph is when its inputs have the shapes of the arrays of ``case``."""
    copy = without_weights(model)
    for value in copy.graph.inputs:
        array = case.get(value.name or "")
        if array is not None:
            value.shape = ir.Shape(array.shape)
    for graph in copy.graphs():
        for value in (*graph.outputs, *(made for node in graph for made in node.outputs)):
            value.shape = None  # what the file declares may be a lie
    proto = ir.to_proto(copy)
    with quiet_libraries(), suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=follows_few(copy))
    inferred = ir.from_proto(proto)
    complete = not inferred.functions
    sizes = {
        id(value): (math.prod(case[name].shape), 0)
        for value in inferred.graph.inputs
        if (name := value.name or "") in case
    }
    work = 0
    for node in inferred.graph:
        complete &= not any(True for _ in subgraphs_of(node))
        read = [_elements(value, sizes) for value in node.inputs if value is not None]
        for value in node.outputs:
            elements, bits = _made(value)
            complete &= elements is not None or not value.name
            sizes[id(value)] = (elements or 0, (elements or 0) * bits // 8)
            work += (elements or 0) * max(1, *read, 1)
    held = [held for _, held in sizes.values()]
    return Size(sum(held) + weight_bytes(model), max(held, default=0), work, complete)


def _elements(value: ir.Value, sizes: dict[int, tuple[int, int]]) -> int:
    return sizes[id(value)][0] if id(value) in sizes else 0 if value.const_value is None else value.const_value.size


def _made(value: ir.Value) -> tuple[int | None, int]:
    """Entries of a value, and bits of each."""
    # The standard's inference takes a TopK of fewer than no entries as it stands.
    dims = [] if value.shape is None else [dim for dim in value.shape if isinstance(dim, int) and dim >= 0]
    if value.dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING):
        return None, 0  # a text may be of any length
    return math.prod(dims) if value.shape is not None and len(dims) == len(value.shape) else None, value.dtype.bitwidth


def _repaired(path: Path) -> ir.Model:
    """The file with one name a node: the standard asks for it, and other runtimes do not mind."""
    model = onnx_io.load(path)
    with quiet_libraries():
        common.NameFixPass()(model)
    return model


def _run_forked(
    path: Path, model: ir.Model, cases: Sequence[Case], precise: int, limits: Limits, small: bool
) -> Run | None:
    """Run it in a copy of this process; None where a system has no copies, or if this one does not come to an end.

    A fork inherits locks that other threads hold at that moment: what hangs before anything ran, or although it is
    small, is run again in a process of its own.
    """
    if sys.platform != "linux":
        return None

    def work(channel: Channel) -> None:
        limit_memory(limits.memory)
        _work(channel, folder, path, model, cases, precise)

    replies: dict[str, Message] = {}
    with scratch_folder() as folder, ChildProcess.fork(work, _SUBJECT, where=path) as child:
        try:
            return _collect(child, folder, path, replies, _BASE_SECONDS if small else limits.seconds)
        except TimeoutError:
            if not small and _OPENED in replies:
                raise limits.expired(path) from None
            return None


def _run_confined(path: Path, cases: Sequence[Case], precise: int, limits: Limits) -> Run:
    replies: dict[str, Message] = {}
    with (
        scratch_folder() as folder,
        ChildProcess.start("planish.optimizer.lowering.original.limited_process", _SUBJECT, where=path) as child,
    ):
        save_cases(cases, folder / _INPUTS)
        child.send(
            "run", path=str(path), folder=str(folder), precise=precise, memory=limits.memory,
            cases=len(cases), has_inputs=any(cases),
        )  # fmt: skip
        try:
            # What is imported does not count as time of the file.
            child.receive_before(time.monotonic() + _IMPORT_SECONDS)
        except TimeoutError:
            raise OutOfResources("the process that runs this file does not start", where=path) from None
        try:
            return _collect(child, folder, path, replies, limits.seconds)
        except TimeoutError:
            raise limits.expired(path) from None


def _collect(child: ChildProcess, folder: Path, path: Path, replies: dict[str, Message], seconds: float) -> Run:
    """The outputs that the process leaves, its ``replies`` by name; raises what it complained of, or TimeoutError."""
    deadline = time.monotonic() + seconds
    while (reply := child.receive_before(deadline)) is not None:
        replies[reply.name] = reply
    code = child.wait()
    if -code == signal.SIGKILL:  # by the kernel, when memory ran out, or by somebody: the file is not to blame
        raise OutOfResources("the process that runs this file was killed", where=path, advice=_ADVICE)
    if _FINISHED in replies:
        note: str | None = replies[_FINISHED].values["note"]
    elif code >= 0:
        raise child.failure()
    elif _ANSWERED in replies:
        note = f"ONNX Runtime does not survive it with its own optimizations (signal {-code})"
    else:  # a crash of the runtime
        raise BadInput(f"ONNX Runtime does not survive this file (signal {-code})", where=path)
    if _ANSWERED not in replies:
        return Run([], None, note)  # it was only loaded
    has_reordered = _FINISHED in replies and replies[_FINISHED].values["has_reordered"]
    return Run(load_cases(folder / _OUTPUTS), load_cases(folder / _REORDERED) if has_reordered else None, note)


def main() -> None:
    """Run a file in this process: take its limit, then tell step by step what came out."""
    channel = parent_channel()
    values = channel.receive().values
    with channel.sending_errors():
        registry.interpreter().missing()  # imports it
        limit_memory(values["memory"])
        channel.send(Message("ready"))
        folder = Path(values["folder"])
        cases = load_cases(folder / _INPUTS) if values["has_inputs"] else [{} for _ in range(values["cases"])]
        _work(channel, folder, Path(values["path"]), None, cases, values["precise"])


def _work(
    channel: Channel, folder: Path, path: Path, model: ir.Model | None, cases: Sequence[Case], precise: int
) -> None:
    """Run the file, and tell of each step as soon as it is done: the next step may end the process.

    Outputs are written to files: as parts of mapped files they need not stay in the memory of who asked for them.
    """
    try:
        outputs = _plain(channel, path, model or _repaired(path), cases)
        if cases:
            save_cases(outputs, folder / _OUTPUTS)
            channel.send(Message(_ANSWERED))
        reordered, note = _reordered(path, cases[:precise], outputs) if cases else (None, None)
        if reordered is not None:
            save_cases(reordered, folder / _REORDERED)
        channel.send(Message(_FINISHED, {"note": note, "has_reordered": reordered is not None}))
    except MemoryError as error:
        raise _no_memory(path) from error


def _no_memory(path: Path) -> OutOfResources:
    return OutOfResources("running this file takes too much memory", where=path, advice=_ADVICE)


def _plain(channel: Channel, path: Path, model: ir.Model, cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
    try:
        engine = registry.interpreter().load(model)
        channel.send(Message(_OPENED))
        return [thin(case, engine.run(case)) for case in cases]
    except (BadInput, CheckFailed) as error:
        if any(said in error.what for said in _NO_MEMORY):
            raise _no_memory(path) from error
        raise BadInput(error.what, where=path, advice=error.advice) from error


def _reordered(
    path: Path, cases: Sequence[Case], outputs: Sequence[Case]
) -> tuple[list[dict[str, np.ndarray]] | None, str | None]:
    """The outputs with the runtime's own optimizations, None with a reason where they fail or are other ones."""
    try:
        engine = registry.interpreter().open(path)
        results = [thin(case, engine.run(case)) for case in cases]
    except (BadInput, CheckFailed) as error:
        return None, f"ONNX Runtime does not run it with its own optimizations ({error.what})"
    for wanted, given in zip(outputs, results, strict=False):
        for name in wanted:
            if not _alike(wanted[name], given[name]):
                return None, f"ONNX Runtime's own optimizations change its output {name!r}"
    return results, None


def _alike(wanted: np.ndarray, given: np.ndarray) -> bool:
    if wanted.shape != given.shape or wanted.dtype != given.dtype:
        return False
    if wanted.dtype.kind != "f":
        return True  # a rounded number, or the place of the largest one, may well be another
    finite = np.isfinite(wanted)
    scale = np.abs(wanted[finite]).astype(np.float64).max(initial=0.0)
    near = np.isclose(
        given.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=_CHANGED * scale, equal_nan=True
    )
    return bool(near.all())


def announce(path: Path, note: str) -> None:
    """Say aloud that the runtime does not know how to optimize the file."""
    logging.getLogger("planish").warning("planish: note: %s: %s; compared without them", path, note)
