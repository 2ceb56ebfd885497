"""`planish bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planish.optimizer.cli.options import existing, parse_shapes, shapes_option

if TYPE_CHECKING:
    from planish.optimizer.driver.bench import RooflineRow
    from planish.optimizer.timing.roofline import Row


@click.command("bench")
@click.argument("models", type=existing, nargs=-1, required=True)
@click.option("--against", type=existing, multiple=True, help="Models to compare with; the first is the baseline.")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME[{k=v …}]", help="Options for a runtime: onnxruntime{threads=2}."
)
@shapes_option
@click.option(
    "--roofline", is_flag=True,
    help="Tell as well how far each operator is from what this machine can do, by the runtime's own counters.",
)  # fmt: skip
@click.option(
    "--json", "json_file", type=existing, help="Write the timings to this file as well ('-': print JSON only)."
)
def command(
    models: tuple[Path, ...],
    against: tuple[Path, ...],
    targets: tuple[str, ...],
    shapes: tuple[str, ...],
    json_file: Path | None,
    roofline: bool,
) -> None:
    """Time MODELS (outputs, engine folders, .onnx and .xml files) in alternation, each in a process of its own."""
    from planish.optimizer.cli.display import print_table, progress_bar
    from planish.optimizer.driver.bench import bench, rooflines
    from planish.optimizer.system.staging import demand_apart, staged_file

    for model in (*models, *against):
        demand_apart(model, {}, {"--json": json_file if str(json_file) != "-" else None})
    sizes = parse_shapes(shapes)
    lines = []
    if roofline:  # before the race, which takes longer: a runtime without counters is told of at once
        with progress_bar(quiet=str(json_file) == "-") as progress:
            lines = rooflines((*against, *models), sizes, targets, progress=progress)
    with progress_bar(quiet=str(json_file) == "-") as progress:
        rows = bench(models, against, sizes, targets, progress=progress)
    described = {(line.label, line.shape, line.component): line.roofline.described() for line in lines}
    figures = [
        {"model": r.label, "shape": r.shape, **asdict(r.timing)}
        | ({"roofline": described[r.label, r.shape, r.component]} if roofline else {})
        for r in rows
    ]
    text = json.dumps(figures, indent=1)
    if json_file is not None and str(json_file) == "-":
        click.echo(text)
        return
    if json_file is not None:
        with staged_file(json_file) as path:
            path.write_text(text + "\n", encoding="utf-8")
    table = [
        (
            r.label,
            r.shape,
            f"{r.timing.median_ms:.2f}",
            f"{r.timing.speedup:.2f}x",
            f"[{r.timing.low:.2f}, {r.timing.high:.2f}]",
        )
        for r in rows
    ]
    several = len({row.component for row in rows}) > 1
    baseline = "the first engine of each component" if several else rows[0].label
    print_table(f"compared with {baseline}", ("model", "shape", "median ms", "speed-up", "95 % interval"), table)
    for line in lines:
        _print_roofline(line)


_SLOWEST = 10
"""Operators that are printed one by one; all are in the JSON."""
_COLUMNS = ("operator", "kernel", "type", "count", "ms", "share", "10⁹ multiply-adds/s", "of the peak")


def _print_roofline(line: RooflineRow) -> None:
    """Print the peaks, the operators by kind, and the slowest of them."""
    from planish.optimizer.cli.display import print_table

    roofline, peaks = line.roofline, line.roofline.peaks
    click.echo(f"\nroofline of {line.label} at {line.shape}")
    rates = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in peaks.multiply_adds.items())
    click.echo(
        f"peaks of this machine: 10⁹ multiply-adds/s {rates}; memory {peaks.weights / 1e9:.0f} GB/s for as many bytes "
        f"as the weights, {peaks.activations / 1e9:.0f} GB/s for 1 MiB"
    )
    share = roofline.roof_milliseconds / (roofline.milliseconds or 1.0)
    click.echo(
        f"all operators {roofline.milliseconds:.2f} ms by the runtime's counters, "
        f"their products at the peaks {roofline.roof_milliseconds:.2f} ms ({share:.0%})"
    )
    print_table("by kind", _COLUMNS, list(map(_cells, roofline.by_kind())))
    print_table(f"the slowest {_SLOWEST}", _COLUMNS, list(map(_cells, roofline.by_operator()[:_SLOWEST])))


def _cells(row: Row) -> tuple[str, ...]:
    rates = (f"{row.rate / 1e9:.0f}", f"{row.achieved:.0%}") if row.rate else ("-", "-")
    milliseconds, share = f"{row.milliseconds:.3f}", f"{row.share:.1%}"
    return row.name, row.kernel, row.arithmetic, str(row.count), milliseconds, share, *rates
