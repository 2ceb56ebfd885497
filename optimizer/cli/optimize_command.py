"""`planish optimize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

from planish.optimizer.cli.completion import complete_pipeline, complete_presets, complete_targets, complete_tasks
from planish.optimizer.cli.options import (
    Sectioned,
    existing,
    expect_option,
    fix_option,
    json_flag,
    keep_option,
    parse_fixed,
    parse_shapes,
    print_json,
    shapes_option,
)
from planish.optimizer.interfaces.registry import DEFAULT_TARGET


class _Optimize(Sectioned):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Build": ("out", "task", "targets", "preset", "pipeline", "adapter", "logits", "fix"),
        "Accuracy": ("keep", "evaluate", "expect", "calibration", "samples", "reference"),
        "Timing": ("shapes", "profile", "roofline"),
        "Reproducible builds": ("lock", "depfile"),
    }


@click.command("optimize", cls=_Optimize)
@click.argument("source", type=existing)
@click.option(
    "-o", "--output", "out", type=existing, required=True, help="The output folder; it is written atomically."
)
@click.option("--task", shell_complete=complete_tasks, help="The task; read from config.json if not given.")
@click.option(
    "--target", "targets", multiple=True, shell_complete=complete_targets, metavar="NAME[{k=v …}]",
    default=[DEFAULT_TARGET], show_default=True,
    help="A runtime to build for, with its options; repeatable.",
)  # fmt: skip
@click.option("--preset", shell_complete=complete_presets, help="A named pipeline: exact (default), fast or small.")
@click.option(
    "--pipeline",
    metavar="TEXT",
    shell_complete=complete_pipeline,
    help="The passes to run: a,b{k=v},c. A failed check ends the run.",
)
@click.option(
    "--calibration", type=existing,
    help="Your own reference and calibration inputs: texts (.txt, .jsonl) or arrays (.npz).",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(1), help="Maximum number of calibration texts; 256 if not given.")
@keep_option
@click.option(
    "--evaluate", metavar="COMMAND",
    help="Your own metric: a command that gets the engine's folder and prints a number on its last line, for --keep "
    "'score>=0.9' or 'score>=0.99x'.",
)  # fmt: skip
@shapes_option
@fix_option
@expect_option
@click.option(
    "--profile", type=existing,
    help="Tuning table: measured operator latencies for each target. Missing entries are measured and added.",
)  # fmt: skip
@click.option(
    "--roofline", is_flag=True,
    help="Measure how far each operator of the engines is from what this machine can do; the report shows it.",
)  # fmt: skip
@click.option("--lock", type=existing, help="Build from this lock, or write it if it does not exist.")
@click.option("--adapter", type=existing, help="A PEFT adapter (LoRA, rsLoRA, DoRA, AdaLoRA) to merge into SOURCE.")
@click.option(
    "--reference", type=click.Choice(["full", "offload", "none"]), default="full", show_default=True,
    help="'offload': read weights from the files on use, for a checkpoint larger than memory. 'none': no checks.",
)  # fmt: skip
@click.option(
    "--logits", type=click.Choice(["all", "last"]), default="all", show_default=True,
    help="'last': a decoder gives the scores after the last token only, which is sufficient for generation.",
)  # fmt: skip
@click.option("--depfile", type=existing, help="Write the list of files that were read, in make's syntax.")
@json_flag
def command(
    source: Path,
    out: Path,
    shapes: tuple[str, ...],
    fix: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile SOURCE (a checkpoint folder or an .onnx file) to engines, check their accuracy, and time them."""
    from planish.optimizer.cli.display import print_result, progress_bar
    from planish.optimizer.driver.optimize import optimize
    from planish.optimizer.output.lock import LOCK, Lock

    options |= {"shapes": parse_shapes(shapes), "fix": parse_fixed(fix)}
    with progress_bar(quiet=as_json) as progress:
        result = optimize(source, out, progress=progress, **options)
    for note in result.notes:
        click.echo(f"planish: note: {note}", err=True)
    if as_json:
        print_json(
            {
                "output": str(out),
                "manifest": result.manifest.model_dump(mode="json"),
                "measurements": result.measurements,
            }
        )
        return
    latencies = {name: target["latency_ms"] for name, target in result.measurements["targets"].items()}
    print_result(result.manifest, Lock.read(out / LOCK).targets, latencies)
    click.echo(f"report: {out / 'report.html'}")
