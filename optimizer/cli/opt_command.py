"""`planish opt`: the counterpart of mlir-opt for ONNX graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from planish.optimizer.cli.completion import complete_pipeline, complete_presets, complete_targets
from planish.optimizer.cli.options import existing, expect_option, json_flag, keep_option, print_json
from planish.optimizer.errors import UsageError


@click.command("opt")
@click.argument("source", type=existing)
@click.option("-o", "--output", "out", type=existing, required=True, help="The .onnx file to write.")
@click.option("--pipeline", metavar="TEXT", shell_complete=complete_pipeline, help="The passes to run: a,b{k=v},c.")
@click.option("--preset", shell_complete=complete_presets, help="The pipeline of a preset, for --target.")
@click.option(
    "--target",
    shell_complete=complete_targets,
    help="The target of --preset; onnxruntime if not given.",
)
@keep_option
@click.option("--calibration", type=existing, help="Your own inputs (arrays, .npz), as calibration data.")
@click.option("--print-before", is_flag=True, help="Print the graph before each pass.")
@click.option("--print-after", is_flag=True, help="Print the graph after each pass.")
@click.option("--print-after-change", is_flag=True, help="Print the graph after each pass that changed it.")
@click.option("--check/--no-check", default=True, show_default=True, help="Verify and compare after each pass.")
@expect_option
@json_flag
def command(source: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Run a pipeline over the ONNX file SOURCE; every pass is verified and compared."""
    from planish.optimizer.cli.display import print_table
    from planish.optimizer.driver.opt import OptOptions, optimize_file
    from planish.optimizer.output.manifest import PassRecord

    if (options["pipeline"] is None) == (options["preset"] is None):
        raise UsageError("give either --pipeline or --preset")
    reports = optimize_file(source, out, OptOptions(**options))
    records = [PassRecord.of("model", report) for report in reports]
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
        return
    rows = [
        (
            record.text,
            str(record.sites),
            "\n".join(record.refusals),
            f"{record.nodes[0]} -> {record.nodes[1]}",
            f"{record.weight_bytes[0] / 1e6:.1f} -> {record.weight_bytes[1] / 1e6:.1f} MB",
            _difference(record.difference) if record.modified else "unchanged",
            "\n".join(f"{name} {value}" for name, value in record.facts.items()),
        )
        for record in records
    ]
    columns = ("pass", "sites", "refused", "nodes", "weights", "change of outputs", "facts")
    print_table(f"{source} -> {out}", columns, rows)
    if not any(record.modified for record in records):
        click.echo("planish: note: no pass changed anything", err=True)


def _difference(difference: dict[str, dict[str, float]] | None) -> str:
    """Largest relative change over all outputs."""
    if difference is None:
        return "not compared"
    return f"{max((metrics['max_rel'] for metrics in difference.values()), default=0.0):.1e}"
