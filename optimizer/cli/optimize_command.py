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


class _Optimize(Sectioned):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "What to build": ("out", "task", "targets", "preset", "pipeline", "adapter", "logits", "fix"),
        "How close it must stay": ("keep", "evaluate", "expect", "calibration", "samples", "reference"),
        "What is timed": ("shapes", "profile"),
        "Building again": ("lock", "depfile"),
    }


@click.command("optimize", cls=_Optimize)
@click.argument("source", type=existing)
@click.option(
    "-o", "--output", "out", type=existing, required=True, help="The folder to make; appears complete or not at all."
)
@click.option("--task", shell_complete=complete_tasks, help="The task to serve; read from config.json if not given.")
@click.option(
    "--target", "targets", multiple=True, shell_complete=complete_targets, metavar="NAME[{k=v …}]",
    default=["onnxruntime"], show_default=True,
    help="A runtime to build for, with its options; may be given several times.",
)  # fmt: skip
@click.option("--preset", shell_complete=complete_presets, help="A named pipeline: exact (default), fast or small.")
@click.option(
    "--pipeline",
    metavar="TEXT",
    shell_complete=complete_pipeline,
    help="The passes to run, as text: a,b{k=v},c. Failed checks end the run.",
)
@click.option("--calibration", type=existing, help="Your own inputs: .txt or .jsonl of texts, or .npz of arrays.")
@click.option("--samples", type=click.IntRange(1), help="Texts that are calibrated on, at most; 256 if not given.")
@keep_option
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
    lock: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn SOURCE (a checkpoint folder or an .onnx file) into checked, measured engines."""
    from planish.optimizer.cli.display import print_result, progress_bar
    from planish.optimizer.driver.optimize import optimize
    from planish.optimizer.output.depfile import escaped, write_depfile
    from planish.optimizer.output.lock import LOCK, Lock
    from planish.optimizer.system.staging import MANIFEST, demand_apart, demand_not_read

    demand_apart(out, {}, {"--depfile": depfile})
    read = {f"--{name}": options[name] for name in ("calibration", "profile")} | {"SOURCE": source, "--lock": lock}
    demand_not_read(read, {"--depfile": depfile})
    locked = lock is not None and lock.is_file()
    for name in (source, out, lock, options["calibration"], options["profile"]) if depfile is not None else ():
        escaped(name or Path())  # what cannot be written is refused before anything is built
    options |= {"shapes": parse_shapes(shapes), "fix": parse_fixed(fix), "lock": lock}
    with progress_bar(quiet=as_json) as progress:
        result = optimize(source, out, progress=progress, **options)
    for note in result.notes:
        click.echo(f"planish: note: {note}", err=True)
    if depfile is not None:
        made = [lock] if lock is not None and not locked else []
        made += [path for path in (options["profile"],) if path and path.is_file()]  # what it lacked was added
        inputs = _inputs(source, [*result.manifest.source.files], options)
        demand_not_read({str(path): path for path in inputs}, {"--depfile": depfile})
        write_depfile(depfile, out / MANIFEST, [*inputs, *([lock] if lock else [])], made)
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


def _inputs(source: Path, names: list[str], options: Mapping[str, Any]) -> list[Path]:
    """The files that a build has read, of which ``names`` lie in the source's folder or in the adapter's."""
    from planish.optimizer.fidelity.user_metric import Evaluation
    from planish.optimizer.lowering.checkpoint.adapter import FILES

    folder, adapter = source if source.is_dir() else source.parent, options["adapter"]
    read = [adapter / name if adapter is not None and name in FILES else folder / name for name in names]
    read += [options[name] for name in ("calibration", "profile") if options[name] is not None]
    judge = Evaluation.parse(options["evaluate"]).words if options["evaluate"] else ()
    read += [Path(word) for word in judge]
    return [path for path in read if path.is_file()]
