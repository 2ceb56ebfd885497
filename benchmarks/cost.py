"""What building costs, beside the peers' exports: seconds and peak memory, `python -m benchmarks.cost`."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

from benchmarks.record import record
from benchmarks.subjects import PEERS, bert_base, optimum_command, plain_exports

_PLANISH = [sys.executable, "-m", "planish.optimizer.cli"]
_POLL_SECONDS = 0.02
_TORCH = (
    "import sys; from pathlib import Path; from benchmarks.subjects import torch_export; "
    "torch_export(Path(sys.argv[1]), Path(sys.argv[2]), dynamo=sys.argv[3] == 'dynamo')"
)


@dataclass(frozen=True)
class Cost:
    """Of one command with all its child processes."""

    seconds: float
    peak_bytes: int
    """Most memory of all processes together; pages that several share are counted once."""
    largest_bytes: int
    """Most memory of any one process."""


def cost_of(command: Sequence[str]) -> Cost:
    """Run a command to its end and watch it."""
    start = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    together = largest = 0
    while process.poll() is None:
        sizes = _sizes(psutil.Process(process.pid))
        together, largest = max(together, sum(sizes)), max([largest, *sizes])
        time.sleep(_POLL_SECONDS)
    if process.returncode != 0:
        raise SystemExit(f"failed with exit code {process.returncode}: {' '.join(command)}")
    return Cost(time.perf_counter() - start, together, largest)


def _sizes(process: psutil.Process) -> list[int]:
    """Proportional set sizes of a process and its children, in bytes."""
    try:
        return [one.memory_full_info().pss for one in (process, *process.children(recursive=True))]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []


def contestants(checkpoint: Path, lock: Path, folder: Path) -> dict[str, list[str]]:
    """Label -> command that makes an engine or a plain file of a checkpoint."""
    target = ["--target", "onnxruntime", "--preset", "exact", "--lock", str(lock)]
    found = {
        "planish optimize --preset exact, checked": [
            *_PLANISH, "optimize", str(checkpoint), "-o", str(folder / "planish"), *target
        ],
    }  # fmt: skip
    for label, way in {"torch.onnx.export": "dynamo", "torch.onnx.export (TorchScript)": "script"}.items():
        found[label] = [sys.executable, "-c", _TORCH, str(checkpoint), str(folder / f"{way}.onnx"), way]
    if PEERS.exists():
        found["optimum export"] = [*optimum_command(checkpoint), str(folder / "optimum")]
    return found


def locked(checkpoint: Path) -> Path:
    """A lock of this build: with it nothing is timed, and lowering, passes, emission and check remain."""
    place = Path(tempfile.mkdtemp()) / "bert-base.lock"
    subprocess.run(
        [*_PLANISH, "optimize", str(checkpoint), "-o", str(place.parent / "out"), "--lock", str(place)],
        check=True, capture_output=True,
    )  # fmt: skip
    return place


@click.command()
@click.option("--rounds", default=3, show_default=True)
def main(rounds: int) -> None:
    """Watch BERT-base being built, beside the plain exports, in alternation; and time `planish --help`."""
    checkpoint = bert_base()
    plain_exports("bert-base")
    lock = locked(checkpoint)
    costs: dict[str, list[Cost]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for label, command in contestants(checkpoint, lock, Path(folder)).items():
                costs.setdefault(label, []).append(cost_of(command))
    costs["planish --help"] = [cost_of([*_PLANISH, "--help"]) for _ in range(10)]
    rows = [(label, *_texts(found)) for label, found in costs.items()]
    figures = {label: [cost.__dict__ for cost in found] for label, found in costs.items()}
    what = f"BERT-base to an engine or a file: medians of {rounds} runs with all child processes"
    record("cost", what, ("command", "seconds", "peak, all processes", "peak, largest process"), rows, figures)
    shutil.rmtree(lock.parent)


def _texts(costs: Sequence[Cost]) -> tuple[str, str, str]:
    seconds = [cost.seconds for cost in costs]
    together, largest = max(cost.peak_bytes for cost in costs), max(cost.largest_bytes for cost in costs)
    span = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    return span, f"{together / 1e9:.2f} GB", f"{largest / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
