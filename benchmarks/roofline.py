"""How far engines are from what this machine can do, by the runtimes' counters: `python -m benchmarks.roofline`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from benchmarks import decode
from benchmarks.record import family, record, settle_memory
from benchmarks.subjects import (
    AS_LOADED,
    CHECKPOINTS,
    FAST,
    TARGETS,
    nncf_int8,
    our_engines,
    ours,
    plain_exports,
    vnni_int8,
)
from planish.optimizer.cli.options import parse_shapes
from planish.optimizer.fidelity.inputs import sized_case
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Arrays
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.generation import DECODER
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.roofline import Roofline, roofline

_MODELS = (*CHECKPOINTS, "gemma3-270m")
_SHAPE = "batch=1,sequence=128"
_KINDS = 4
"""Kinds of operators that a row of the table names; all are in the JSON."""

Cell = tuple[str, EngineRef, Arrays]
"""A label, an engine and its inputs."""


def encoders(name: str, sizes: dict[str, int]) -> Iterator[Cell]:
    """The plain files, the peers' in 8 bits, and ours that compete with them."""
    plain = plain_exports(name)
    peers = {
        "optimum export on onnxruntime": (TARGETS[0], plain["optimum export"]),
        "optimum's int8 for VNNI": (TARGETS[0], vnni_int8(name)),
        "torch.onnx.export on openvino": (AS_LOADED, plain["torch.onnx.export"]),
        "NNCF's static int8 on openvino": (AS_LOADED, nncf_int8(name)),
    }
    own = our_engines(name, FAST)
    case, _ = sized_case(Manifest.read(ours(name, FAST[0])).signatures["model"].signature(), sizes)
    for label, engine in {**peers, **own}.items():
        yield label, EngineRef(*engine), case


def decoder(name: str, sizes: dict[str, int]) -> Iterator[Cell]:
    """The plain lowering and the preset `small`, reading a prompt and writing one token behind it."""
    subject = decode.SUBJECTS[name]
    small = {target: decode.ours(subject, target, "all") for target in TARGETS}
    signature = Manifest.read(small[TARGETS[0]].parent).signatures[DECODER].signature()
    for target, opened in zip(TARGETS, (TARGETS[0], AS_LOADED), strict=True):
        backend = registry.backend(target)
        files = {f"plain on {backend.name}": decode.plain(subject, target)}
        files[f"planish small on {backend.name}"] = small[target]
        for what, tokens, past in (("prompt", sizes["sequence"], 0), ("one token", 1, sizes["sequence"])):
            case, _ = sized_case(signature, {"batch": sizes["batch"], "sequence": tokens, PAST: past})
            for label, folder in files.items():
                yield f"{label}, {what}", EngineRef(opened, backend.path_of(DECODER, folder)), case


def _kinds(line: Roofline) -> str:
    """The slowest kinds of operators: share of the time and, for products, of the peak."""
    rows = line.by_kind()[:_KINDS]
    peaks = [f", {row.achieved:.0%} of the {row.arithmetic} peak" if row.rate else "" for row in rows]
    return "; ".join(f"{row.name} {row.share:.0%}{peak}" for row, peak in zip(rows, peaks, strict=True))


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(_MODELS), help="Only this; all if none.")
def main(models: tuple[str, ...]) -> None:
    """Measure rooflines of plain files, of peers and of our engines that `benchmarks.speed` and `.decode` built."""
    (sizes,) = parse_shapes((_SHAPE,))
    settle_memory()
    for name in models or _MODELS:
        rows, figures = [], {}
        for label, engine, case in (encoders if name in CHECKPOINTS else decoder)(name, sizes):
            line = roofline(engine, case)
            # Single operators would be fifty thousand lines; `planish bench --roofline --json` has them.
            figures[label] = {k: v for k, v in line.described().items() if k != "by_operator"}
            share = line.roof_milliseconds / line.milliseconds
            times = f"{line.milliseconds:.2f}", f"{line.roof_milliseconds:.2f}", f"{share:.0%}"
            rows.append((label, *times, _kinds(line)))
        peaks = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in line.peaks.multiply_adds.items())
        what = f"Rooflines of {name} at {_SHAPE} on {family()}; peaks in 10⁹ multiply-adds a second: {peaks}"
        columns = ("engine", "ms of all operators", "ms of their products at the peaks", "share", "slowest kinds")
        record(f"roofline-{name}", what, columns, rows, figures, command="roofline")


if __name__ == "__main__":
    main()
