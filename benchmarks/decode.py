"""Prefill and decode of a GPT-2 beside optimum's export, in one alternating run: `python -m benchmarks.decode`.

Each call behind a cache hands tensors of the runtime in and gets them back, as IO binding does: no cache is copied
between the runtime and Python, on either side.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from benchmarks.record import record
from benchmarks.subjects import PLACE, TARGETS, gpt2, label_of, optimum_export
from planish.optimizer import optimize
from planish.optimizer.building import sized_case
from planish.optimizer.manifest import Manifest
from planish.optimizer.measure import EngineRef, alternate, timing

_SHAPES = {
    "prefill of 128": {"batch": 1, "sequence": 128, "past": 0},
    "decode behind 128": {"batch": 1, "sequence": 1, "past": 128},
}


def peer() -> Path:
    """optimum's export with a cache, made once."""
    path = PLACE / "plain" / "gpt2" / "model.onnx"
    if not path.exists():
        print("exporting gpt2: optimum", file=sys.stderr)
        optimum_export(gpt2(), path.parent, "text-generation-with-past")
    return path


@click.command()
@click.option("--seconds", default=120.0, show_default=True, help="Longest time for one shape.")
@click.option("--keep", is_flag=True, help="Measure the engines that were built before.")
def main(seconds: float, keep: bool) -> None:
    """Time our engines beside optimum's export."""
    folder = PLACE / "ours" / "gpt2-exact"
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        optimize(gpt2(), folder, targets=TARGETS, preset="exact")
    manifest = Manifest.read(folder)
    racing = {"optimum export on onnxruntime": EngineRef(TARGETS[0], peer())}
    for target, name in zip(TARGETS, manifest.targets, strict=True):
        racing[label_of("exact", name, manifest.targets[name].shipped)] = EngineRef(target, folder / name)
    rows, figures = [], {}
    for what, sizes in _SHAPES.items():
        case, _ = sized_case(manifest.signatures["model"].signature(), sizes)
        turns = alternate(list(racing.values()), [case] * len(racing), seconds=seconds)
        for label, own in zip(racing, turns, strict=True):
            found = timing(turns[0], own)
            figures[f"{what}: {label}"] = found.__dict__
            ratio = f"{found.speedup:.2f} [{found.low:.2f}, {found.high:.2f}]"
            rows.append((what, label, f"{found.median_ms:.2f}", ratio))
    title = "GPT-2's shape in fp32, two threads: medians, ratios with 95 % intervals"
    record("decode", title, ("what", "engine", "median ms", "times as fast as optimum export"), rows, figures)


if __name__ == "__main__":
    main()
