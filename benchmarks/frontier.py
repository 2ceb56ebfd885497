"""Accuracy over latency of all-MiniLM-L6-v2 as budgets get wider: `python -m benchmarks.frontier`.

For each budget the preset `fast` chooses anew which products are rounded. All engines run in one alternation, beside
the plain export and the usual quantizers, each as a loader without options opens it; accuracy is that of sentences that
nobody calibrated on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from benchmarks.fidelity import engine_outputs, figures_of, inputs, original
from benchmarks.record import canvas, record, results, settle_memory
from benchmarks.subjects import (
    AS_LOADED,
    PLACE,
    TARGETS,
    calibration,
    dynamic_int8,
    minilm,
    nncf_int8,
    plain_exports,
    vnni_int8,
)
from planish.optimizer import optimize
from planish.optimizer.fidelity.inputs import sized_case
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import time_interleaved

BUDGETS = (0.9999, 0.9995, 0.9993, 0.999, 0.99)
BASE = "optimum export"


def built(budget: float) -> Path:
    """Our engines for both targets within a budget."""
    folder = PLACE / "frontier" / f"{budget:g}"
    if not folder.exists():
        keep = [f"cosine>={budget:g}"]
        optimize(minilm(), folder, targets=TARGETS, preset="fast", keep=keep, calibration=calibration("minilm"))
    return folder


def field() -> dict[str, tuple[str, Path]]:
    """Label -> target and path; the plain export first."""
    found = {
        BASE: (TARGETS[0], plain_exports("minilm")[BASE]),
        "onnxruntime's dynamic int8": (TARGETS[0], dynamic_int8("minilm")),
        "optimum's int8 for VNNI": (TARGETS[0], vnni_int8("minilm")),
        "NNCF's static int8": (AS_LOADED, nncf_int8("minilm")),
    }
    for budget in BUDGETS:
        for target in (TARGETS[0], AS_LOADED):
            name = target.partition("{")[0]
            found[f"{name}, cosine>={budget:g}"] = (target, built(budget) / name)
    return found


def rounded(label: str) -> str:
    """How many products of one of our engines are rounded."""
    name, _, clause = label.partition(", cosine>=")
    if not clause:
        return ""
    products = Lock.read(built(float(clause)) / LOCK).targets[name].products
    forms = {one.text for one in products if one.rounded}
    return f"{sum(one.rounded for one in products)} by {', '.join(sorted(forms)) or 'nothing'}"


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Speed-up along x, what sentences lose of their cosine along y, on a logarithmic scale."""
    shape, axes = canvas(7, 4.5)
    for name, marker in (("onnxruntime", "o"), ("openvino", "s")):
        own = [f for label, f in figures.items() if label.startswith(f"{name}, ")]
        axes.plot([f["speedup"] for f in own], [1 - f["cosine"] for f in own], marker=marker, label=f"planish, {name}")
    for label, f in list(figures.items())[1:4]:
        axes.plot([f["speedup"]], [1 - f["cosine"]], "x", label=label)
    axes.set(xlabel=f"times as fast as the {BASE}", ylabel="1 - mean sentence cosine", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    shape.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--seconds", default=240.0, show_default=True, help="Longest time for the alternation.")
@click.option("--keep", is_flag=True, help="Measure the engines that were built before.")
def main(seconds: float, keep: bool) -> None:
    """Draw the frontier."""
    if not keep:
        shutil.rmtree(PLACE / "frontier", ignore_errors=True)
    racing = field()
    signature = Manifest.read(built(BUDGETS[0])).signatures["model"].signature()
    case, _ = sized_case(signature, {"batch": 1, "sequence": 128})
    settle_memory()
    race = time_interleaved([EngineRef(*one) for one in racing.values()], [case] * len(racing), seconds=seconds)
    batches = inputs("minilm", 160)
    expected = original("minilm", batches)
    figures: dict[str, dict[str, float]] = {}
    rows = []
    for (label, (target, path)), found in zip(racing.items(), race.timings(), strict=True):
        close = figures_of(engine_outputs(target, path, batches), expected, batches)
        figures[label] = {
            "speedup": found.speedup,
            "low": found.low,
            "high": found.high,
            "cosine": close["mean_cosine"],
            "neighbours": close["neighbour_agreement"],
        }
        speed = f"{found.speedup:.2f} [{found.low:.2f}, {found.high:.2f}]"
        fidelity = (f"{close['mean_cosine']:.5f}", f"{close['neighbour_agreement']:.3f}")
        rows.append((label, f"{found.median_ms:.2f}", speed, *fidelity, rounded(label)))
    what = "all-MiniLM-L6-v2 at 1 x 128, two threads: what wider budgets buy, on 160 natural sentences"
    columns = (
        "engine",
        "median ms",
        f"times as fast as {BASE}",
        "sentence cosine",
        "nearest neighbour kept",
        "rounded",
    )
    record("frontier", what, columns, rows, figures)
    plot(figures, results() / "frontier.svg")


if __name__ == "__main__":
    main()
