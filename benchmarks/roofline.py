"""How far engines are from what this machine can do, by the runtimes' counters: `python -m benchmarks.roofline`."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.record import family, record, settle_memory
from benchmarks.subjects import (
    AS_LOADED,
    CHECKPOINTS,
    TARGETS,
    nncf_int8,
    our_engines,
    ours,
    plain_exports,
    vnni_int8,
)
from planish.optimizer.cli.options import parse_shapes
from planish.optimizer.fidelity.inputs import sized_case
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.roofline import Roofline, roofline

_KINDS = 4
"""Kinds of operators that a row of the table names; all are in the JSON."""


def field(name: str) -> dict[str, tuple[str, Path]]:
    """Label -> target and path: the plain files, the peers' in 8 bits, and ours that compete with them."""
    plain = plain_exports(name)
    peers = {
        "optimum export on onnxruntime": (TARGETS[0], plain["optimum export"]),
        "optimum's int8 for VNNI": (TARGETS[0], vnni_int8(name)),
        "torch.onnx.export on openvino": (AS_LOADED, plain["torch.onnx.export"]),
        "NNCF's static int8 on openvino": (AS_LOADED, nncf_int8(name)),
    }
    return peers | {label: engine for label, engine in our_engines(name).items() if " fast" in label}


def _kinds(line: Roofline) -> str:
    """The slowest kinds of operators: share of the time and, for products, of the peak."""
    rows = line.by_kind()[:_KINDS]
    peaks = [f", {row.achieved:.0%} of the {row.arithmetic} peak" if row.rate else "" for row in rows]
    return "; ".join(f"{row.name} {row.share:.0%}{peak}" for row, peak in zip(rows, peaks, strict=True))


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(CHECKPOINTS)), help="Only this; both if none.")
@click.option("--shape", default="batch=1,sequence=128", show_default=True)
def main(models: tuple[str, ...], shape: str) -> None:
    """Measure rooflines of plain files, of peers in 8 bits and of our `fast` engines that `benchmarks.speed` built."""
    (sizes,) = parse_shapes((shape,))
    rows, figures = [], {}
    settle_memory()
    for name in models or tuple(CHECKPOINTS):
        signature = Manifest.read(ours(name, "exact")).signatures["model"].signature()
        case, _ = sized_case(signature, sizes)
        for label, (target, path) in field(name).items():
            line = roofline(EngineRef(target, path), case)
            # Single operators would be fifty thousand lines; `planish bench --roofline --json` has them.
            figures[f"{name} {label}"] = {k: v for k, v in line.described().items() if k != "by_operator"}
            share = line.roof_milliseconds / line.milliseconds
            times = f"{line.milliseconds:.2f}", f"{line.roof_milliseconds:.2f}", f"{share:.0%}"
            rows.append((name, label, *times, _kinds(line)))
    peaks = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in line.peaks.multiply_adds.items())
    what = f"Rooflines at {shape} on {family()}; peaks in 10⁹ multiply-adds a second: {peaks}"
    columns = (
        "checkpoint",
        "engine",
        "ms of all operators",
        "ms of their products at the peaks",
        "share",
        "slowest kinds",
    )
    record(f"roofline-{family()}", what, columns, rows, figures, command="roofline")


if __name__ == "__main__":
    main()
