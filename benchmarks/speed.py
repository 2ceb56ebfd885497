"""Latency of our engines beside the plain exports, all in one run, in alternation: `python -m benchmarks.speed`."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.record import family, record, settle_memory
from benchmarks.subjects import (
    AS_LOADED,
    CHECKPOINTS,
    TARGETS,
    dynamic_int8,
    forget_ours,
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
from planish.optimizer.timing.interleaved import Timing, time_interleaved

_PLAIN = "torch.onnx.export on openvino"
_NNCF = "NNCF's static int8 on openvino"
_SHAPE = "batch=1,sequence=128"
_BASES = ("optimum export on onnxruntime", "optimum's int8 for VNNI", _PLAIN, _NNCF)


def field(name: str) -> dict[str, tuple[str, Path]]:
    """Label -> target and path of everything that runs: the plain exports first."""
    found: dict[str, tuple[str, Path]] = {}
    for way, path in plain_exports(name).items():
        found[f"{way} on onnxruntime"] = (TARGETS[0], path)
    found["onnxruntime's dynamic int8"] = (TARGETS[0], dynamic_int8(name))
    found["optimum's int8 for VNNI"] = (TARGETS[0], vnni_int8(name))
    peers = {_PLAIN: plain_exports(name)["torch.onnx.export"], _NNCF: nncf_int8(name)}
    for label, path in peers.items():
        found[label] = (AS_LOADED, path)
        found[f"{label}, f32"] = ("openvino{threads=2 precision=f32}", path)
    return found | our_engines(name)


def measure(name: str, shape: dict[str, int], seconds: float) -> dict[str, dict[str, Timing]]:
    """Label -> baseline -> timing, for one checkpoint at one shape; every engine gets the same inputs."""
    racing = field(name)
    signature = Manifest.read(ours(name, "exact")).signatures["model"].signature()
    case, _ = sized_case(signature, shape)
    engines = [EngineRef(target, path) for target, path in racing.values()]
    settle_memory()
    race, labels = time_interleaved(engines, [case] * len(engines), seconds=seconds), list(racing)
    over = {base: dict(zip(labels, race.timings(labels.index(base)), strict=True)) for base in _BASES}
    return {label: {base: over[base][label] for base in _BASES} for label in labels}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(CHECKPOINTS)), help="Only this; both if none.")
@click.option("--shape", default=_SHAPE, show_default=True)
@click.option("--seconds", default=600.0, show_default=True, help="Longest time for one checkpoint.")
@click.option("--keep", is_flag=True, help="Measure the engines that were built before.")
def main(models: tuple[str, ...], shape: str, seconds: float, keep: bool) -> None:
    """Time our engines beside the plain exports."""
    if not keep:
        forget_ours()
    (sizes,) = parse_shapes((shape,))
    rows, figures = [], {}
    for name in models or tuple(CHECKPOINTS):
        found = measure(name, dict(sizes), seconds)
        figures[name] = {label: {base: t.__dict__ for base, t in timings.items()} for label, timings in found.items()}
        for label, timings in found.items():
            ratios = [f"{t.speedup:.2f} [{t.low:.2f}, {t.high:.2f}]" for t in timings.values()]
            rows.append((name, label, f"{next(iter(timings.values())).median_ms:.2f}", *ratios))
    bases = [f"times as fast as {base}" for base in _BASES]
    what = (
        f"Latency at {shape}, two threads, OpenVINO's files in its own arithmetic but where f32 is said, on {family()}"
    )
    name = "speed" if shape == _SHAPE else f"speed-{'x'.join(map(str, sizes.values()))}"
    record(
        name,
        what,
        ("checkpoint", "engine", "median ms", *bases),
        rows,
        figures,
        command="speed" if shape == _SHAPE else f"speed --shape {shape}",
    )


if __name__ == "__main__":
    main()
