"""`planish optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from planish.optimizer.cli.options import (
    existing,
    expect_option,
    fix_option,
    json_flag,
    parse_fixed,
    parse_shapes,
    print_json,
    shapes_option,
)


@click.command("optimize")
@click.argument("source", type=existing)
@click.option(
    "-o", "--output", "out", type=existing, required=True, help="The folder to make; appears complete or not at all."
)
@click.option("--task", help="The task to serve; read from config.json if not given.")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME[{k=v …}]", default=["onnxruntime"], show_default=True,
    help="A runtime to build for, with its options; may be given several times.",
)  # fmt: skip
@click.option("--preset", help="A named pipeline: exact (default), fast or small.")
@click.option("--pipeline", metavar="TEXT", help="The passes to run, as text: a,b{k=v},c. Failed checks end the run.")
@click.option("--calibration", type=existing, help="Your own inputs: .txt or .jsonl of texts, or .npz of arrays.")
@click.option("--samples", type=click.IntRange(1), help="Texts that are calibrated on, at most; 256 if not given.")
@click.option("--keep", multiple=True, metavar="METRIC>=X", help="Fidelity that passes must keep, e.g. cosine>=0.999.")
@click.option(
    "--evaluate", metavar="COMMAND",
    help="Your own measure: given an engine's folder, it prints a number last, for --keep 'score>=0.9' or '>=0.99x'.",
)  # fmt: skip
@shapes_option
@fix_option
@expect_option
@click.option(
    "--profile", type=existing,
    help="What the targets run fast: presets choose by this file; what it lacks is measured and added.",
)  # fmt: skip
@click.option("--lock", type=existing, help="Build from this lock, or write it if it does not exist.")
@click.option("--adapter", type=existing, help="A PEFT adapter (LoRA, rsLoRA, DoRA, AdaLoRA) to merge into SOURCE.")
@click.option(
    "--reference", type=click.Choice(["full", "offload", "none"]), default="full", show_default=True,
    help="'offload': read weights as they are used, for a checkpoint larger than memory. 'none': check nothing.",
)  # fmt: skip
@click.option(
    "--logits", type=click.Choice(["all", "last"]), default="all", show_default=True,
    help="'last': a decoder scores the token behind the last one only, which is all that writing needs.",
)  # fmt: skip
@click.option("--depfile", type=existing, help="Write the files that were read, in make's syntax.")
@json_flag
def command(
    source: Path,
    out: Path,
    shapes: tuple[str, ...],
    fix: str | None,
    depfile: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn SOURCE (a checkpoint folder or an .onnx file) into checked, measured engines."""
    from planish.optimizer.cli.display import print_result, progress_bar
    from planish.optimizer.driver import optimize
    from planish.optimizer.lock import LOCK, Lock

    with progress_bar(quiet=as_json) as progress:
        result = optimize(source, out, shapes=parse_shapes(shapes), fix=parse_fixed(fix), progress=progress, **options)
    for note in result.notes:
        click.echo(f"planish: note: {note}", err=True)
    if depfile is not None:
        folders = [folder for folder in (options["adapter"], source) if folder is not None]
        others = [path for path in (options["calibration"], options["lock"]) if path]
        _write_depfile(depfile, folders, out, [*result.manifest.source.files], others)
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


def _write_depfile(depfile: Path, sources: list[Path], out: Path, names: list[str], others: list[Path]) -> None:
    """Each name lies in the first of the sources (folders, or a file's folder) that has it."""
    from planish.optimizer.output import staged_file

    folders = [source if source.is_dir() else source.parent for source in sources]
    inputs = [next(folder / name for folder in folders if (folder / name).exists()) for name in names] + others
    escaped = " ".join(str(path).replace(" ", "\\ ") for path in inputs)
    with staged_file(depfile) as path:
        path.write_text(f"{str(out / 'planish.json').replace(' ', chr(92) + ' ')}: {escaped}\n", encoding="utf-8")
