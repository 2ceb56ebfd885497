"""What building costs, beside the peers' exports: seconds and peak memory, `python -m benchmarks.cost`."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil

from benchmarks.record import record
from benchmarks.subjects import bert_base, optimum_command, plain_exports

_PLANISH = [sys.executable, "-m", "planish.optimizer.cli"]
_POLL_SECONDS = 0.1
_TORCH = (
    "import sys; from pathlib import Path; from benchmarks.subjects import torch_export; "
    "torch_export(Path(sys.argv[1]), Path(sys.argv[2]), dynamo=sys.argv[3] == 'dynamo')"
)


@dataclass(frozen=True)
class Peak:
    """Memory of one command with all its child processes, in bytes."""

    together: int
    """Most memory of all processes together; pages that several share are counted once."""
    largest: int
    """Most memory of any one process."""


def seconds_of(command: Sequence[str]) -> float:
    """Run a command to its end, unwatched: asking for the pages of a large process slows it down."""
    start = time.perf_counter()
    _succeeded(command, subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return time.perf_counter() - start


def peak_of(command: Sequence[str]) -> Peak:
    """Run a command to its end and watch its memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    together = largest = 0
    while process.poll() is None:
        sizes = _sizes(psutil.Process(process.pid))
        together, largest = max(together, sum(sizes)), max([largest, *sizes])
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
    _succeeded(command, process.returncode)
    return Peak(together, largest)


def _succeeded(command: Sequence[str], code: int) -> None:
    if code != 0:
        raise SystemExit(f"failed with exit code {code}: {' '.join(command)}")


def _sizes(process: psutil.Process) -> list[int]:
    """Proportional set sizes of a process and its children, in bytes; none where one ended while it was asked."""
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
    return found | {"optimum export": [*optimum_command(checkpoint), str(folder / "optimum")]}


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
    """Build BERT-base beside the plain exports: timed in alternation, then watched once; then `planish --help`."""
    checkpoint = bert_base()
    plain_exports("bert-base")
    lock = locked(checkpoint)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for label, command in contestants(checkpoint, lock, Path(folder)).items():
                seconds.setdefault(label, []).append(seconds_of(command))
    with tempfile.TemporaryDirectory() as folder:
        peaks = {label: peak_of(c) for label, c in contestants(checkpoint, lock, Path(folder)).items()}
    help_ = [*_PLANISH, "--help"]
    seconds["planish --help"], peaks["planish --help"] = [seconds_of(help_) for _ in range(10)], peak_of(help_)
    rows = [(label, _span(seconds[label]), _size(p.together), _size(p.largest)) for label, p in peaks.items()]
    figures = {label: {"seconds": seconds[label], "peak_bytes": asdict(peak)} for label, peak in peaks.items()}
    what = f"BERT-base to an engine or a file: median of {rounds} runs, start of Python included; memory of one run"
    record("cost", what, ("command", "seconds", "peak, all processes", "peak, largest process"), rows, figures)
    shutil.rmtree(lock.parent)


def _span(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def _size(peak: int) -> str:
    return f"{peak / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
