"""Peaks of this machine, measured: multiply-adds by type, and how fast memory is read.

Multiply-adds are those of the fastest large product of any installed runtime: what kernels reach whose operands lie
well, which is less than the data sheet of the processor says. Memory is read by as many threads as there are cores,
again and again: what fits into a cache is read from there, so the rate depends on how much is read (Williams, Waterman
and Patterson: Roofline, Communications of the ACM 52(4), 2009).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.counters import Probe, product
from planish.optimizer.ir.program import Program, Provenance, Signature
from planish.optimizer.runtime.worker import EngineRef, operator_times
from planish.optimizer.system.child_process import ChildProcess, Message, serve
from planish.optimizer.system.machine import cores
from planish.optimizer.system.scratch import scratch_folder

_WIDTH = 1024
_ROWS = (256, 1024)
"""Rows of the products that are tried: operands of the first fit into more caches."""
_CALLS = 40
_SECONDS = 0.4
_LARGEST = 1 << 28
"""Bytes of which more are read no faster and no slower: no cache holds them."""
_SMALLEST = 1 << 20
"""Bytes of activations: what an operator of an encoder reads and writes stays in the caches."""
_READ_AT_LEAST = 1 << 24
"""Bytes that are read between two looks at the clock."""


@dataclass(frozen=True)
class Peaks:
    """Rates of this machine, for all cores together."""

    multiply_adds: Mapping[str, float]
    """Type (`f32`, `bf16`, `i8`) -> multiply-adds per second."""
    weights: float
    """Bytes per second that are read of as many bytes as the weights of the engine."""
    activations: float
    """Bytes per second that are read of 1 MiB, again and again."""


def measure_multiply_adds() -> dict[str, float]:
    """Type -> multiply-adds per second of the fastest product."""
    fastest: dict[str, float] = {}
    for backend in registry.backends():
        for probe in backend.probes() if backend.missing() is None else ():
            fastest[probe.arithmetic] = max(fastest.get(probe.arithmetic, 0.0), *(_rate(probe, n) for n in _ROWS))
    return {kind: rate for kind, rate in fastest.items() if rate}


def _rate(probe: Probe, rows: int) -> float:
    """Multiply-adds per second of a product by the runtime's own counters, without what surrounds it."""
    model = product(rows, _WIDTH, probe)
    with scratch_folder() as scratch:
        program = Program({"model": model}, {"model": Signature((), ())}, "", Provenance("onnx", "product"))
        registry.backend(probe.target).emit(program, scratch)
        times = operator_times(EngineRef(probe.target, scratch), {"x": np.ones((rows, _WIDTH), np.float32)}, _CALLS)
    rates = [
        e.multiply_adds / e.milliseconds * 1e3 for e in times if e.arithmetic == probe.arithmetic and e.milliseconds
    ]
    return max(rates, default=0.0)


def measure_reading(sizes: Sequence[int]) -> list[float]:
    """Bytes per second for working sets of so many bytes, each at most 256 MiB and at least 1 MiB."""
    sizes = [min(max(size, _SMALLEST), _LARGEST) for size in sizes]
    # A thread of its own for each core: the library that numpy multiplies with shall not start more.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    child = ChildProcess.start(__name__, "the process that reads memory", environment=environment)
    with closing(child):
        return [float(rate) for rate in child.request("read", sizes=sizes).values["rates"]]


def _read(size: int) -> float:
    """The highest rate at which all cores read an array of ``size`` bytes: scalar products of its parts."""
    array = np.ones(size // 4, np.float32)
    threads, times = cores(), max(1, _READ_AT_LEAST // size)

    def read(part: np.ndarray) -> None:
        for _ in range(times):
            np.dot(part, part)

    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(read, np.array_split(array, threads)))
            fastest = min(fastest, time.perf_counter() - start)
    return array.nbytes * times / fastest


def main() -> None:
    """Read memory in this process, whose environment says how many threads numpy takes."""
    serve(lambda request: Message("rates", {"rates": [_read(size) for size in request.values["sizes"]]}))
