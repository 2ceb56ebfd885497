"""How often the clock errs: races of twins, and of engines that differ by 3 %, `python -m benchmarks.clock`.

The engines are stacks of equal layers, 100 and 97 of them, so that the gain is known.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.record import record
from benchmarks.subjects import PLACE, TARGETS
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import Timing, time_against_first

_LAYERS, _FEWER = 100, 97
_WIDTH = 128
_ROWS = 64
_WRITE_AFTER = 10
"""Races after which the table is written anew: whoever ends the run early keeps what it has measured."""


def stack(layers: int) -> Path:
    """An ONNX file of ``layers`` products of (rows, width) by (width, width), each with its own weights."""
    path = PLACE / "clock" / f"{layers}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(0)
        weights = [draw.standard_normal((_WIDTH, _WIDTH), np.float32) / 16 for _ in range(layers)]
        nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(layers)]
        graph = helper.make_graph(
            nodes,
            "stack",
            [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [_ROWS, _WIDTH])],
            [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, [_ROWS, _WIDTH])],
            [numpy_helper.from_array(weight, f"w{n}") for n, weight in enumerate(weights)],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _spin() -> None:
    while True:
        pass


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Processes that do nothing but use a core each."""
    with ExitStack() as ending:
        for _ in range(processes):
            process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
            process.start()
            ending.callback(process.kill)
        yield


def race(layers: int) -> Timing:
    """The timing of a stack of ``layers`` relative to one of all."""
    engines = [EngineRef(TARGETS[0], stack(_LAYERS)), EngineRef(TARGETS[0], stack(layers))]
    case = {"x0": np.ones((_ROWS, _WIDTH), np.float32)}
    return time_against_first(engines, [case, case])[1]


@click.command()
@click.option("--races", default=100, show_default=True, help="Of twins.")
@click.option("--gains", default=30, show_default=True, help="Races of engines that differ by 3 %.")
@click.option("--quiet/--loaded", default=True, help="Beside nothing, or beside four processes that use a core each.")
def main(races: int, gains: int, quiet: bool) -> None:
    """Count intervals of twins that exclude one, and gains of 3 % that are found."""
    timed: dict[str, list[Timing]] = {}
    with load(0 if quiet else 4):
        for kind, layers, count in (("twins", _LAYERS, races), ("3 % faster", _FEWER, gains)):
            timed[kind] = []
            for number in range(count):
                timed[kind].append(race(layers))
                if (number + 1) % _WRITE_AFTER == 0 or number + 1 == count:
                    write(timed, quiet)


def write(timed: Mapping[str, Sequence[Timing]], quiet: bool) -> None:
    """Record what is timed so far, by kind of race."""
    rows = []
    for kind, timings in timed.items():
        apart = sum(not timing.low <= 1 <= timing.high for timing in timings)
        faster = sum(timing.faster for timing in timings)
        width = float(np.median([timing.high / timing.low - 1 for timing in timings]))
        middle = float(np.median([timing.speedup for timing in timings]))
        shares = [f"{number} ({number / len(timings):.0%})" for number in (apart, faster)]
        rows.append((kind, str(len(timings)), f"{middle:.3f}", f"{width:.1%}", *shares))
    figures = {kind: [timing.__dict__ for timing in timings] for kind, timings in timed.items()}
    name = f"clock-{'quiet' if quiet else 'loaded'}"
    what = f"Races of equal engines and of a known gain, {'nothing' if quiet else 'four busy processes'} beside them"
    columns = ("engines", "races", "median ratio", "median width", "intervals without one", "found faster")
    record(name, what, columns, rows, figures, command="clock" + ("" if quiet else " --loaded"))


if __name__ == "__main__":
    main()
