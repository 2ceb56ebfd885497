"""`planish bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from planish.optimizer.cli.options import existing, parse_shapes, shapes_option


@click.command("bench")
@click.argument("models", type=existing, nargs=-1, required=True)
@click.option("--against", type=existing, multiple=True, help="Models to compare with; the first is the baseline.")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME[{k=v …}]", help="Options for a runtime: onnxruntime{threads=2}."
)
@shapes_option
@click.option(
    "--json", "json_file", type=existing, help="Write the timings to this file as well ('-': print JSON only)."
)
def command(
    models: tuple[Path, ...],
    against: tuple[Path, ...],
    targets: tuple[str, ...],
    shapes: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Time MODELS (outputs, engine folders, .onnx and .xml files) in alternation, each in a process of its own."""
    from planish.optimizer.cli.display import print_table, progress_bar
    from planish.optimizer.driver.bench import bench
    from planish.optimizer.system.staging import demand_apart, staged_file

    for model in (*models, *against):
        demand_apart(model, {}, {"--json": json_file if str(json_file) != "-" else None})
    with progress_bar(quiet=str(json_file) == "-") as progress:
        rows = bench(models, against, parse_shapes(shapes), targets, progress=progress)
    figures = json.dumps([{"model": r.label, "shape": r.shape, **asdict(r.timing)} for r in rows], indent=1)
    if json_file is not None and str(json_file) == "-":
        click.echo(figures)
        return
    if json_file is not None:
        with staged_file(json_file) as path:
            path.write_text(figures + "\n", encoding="utf-8")
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
