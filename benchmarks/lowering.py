"""Lowering and saving of checkpoints that generate, beside optimum's export: `python -m benchmarks.lowering`."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.cost import peak_of, seconds_of
from benchmarks.record import record
from benchmarks.subjects import optimum_command, qwen2, t5_small

_SUBJECTS = {
    "Qwen2-0.5B shape, bf16": (qwen2, "text-generation-with-past"),
    "T5-small shape": (t5_small, "text2text-generation-with-past"),
}


@click.command()
@click.option("--rounds", default=3, show_default=True)
def main(rounds: int) -> None:
    """Time whole commands in alternation, start of Python included, then watch the memory of one run each."""
    rows, figures = [], {}
    for subject, (make, task) in _SUBJECTS.items():
        checkpoint = make()
        seconds: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                commands = _commands(checkpoint, task, Path(folder))
                if number < rounds:
                    for label, command in commands.items():
                        seconds.setdefault(label, []).append(seconds_of(command))
                    continue
                peaks = {label: peak_of(command) for label, command in commands.items()}
        for label, own in seconds.items():
            peak = peaks[label].together
            span = f"{statistics.median(own):.1f} ({min(own):.1f} to {max(own):.1f})"
            rows.append((subject, label, span, f"{peak / 1e9:.2f} GB"))
            figures[f"{subject}: {label}"] = {"seconds": own, "peak_bytes": peak}
    what = (
        f"Lowering and saving, unchecked: median of {rounds} runs; memory of all processes of one run, files included"
    )
    record("lowering", what, ("checkpoint", "command", "seconds", "peak"), rows, figures)


def _commands(checkpoint: Path, task: str, folder: Path) -> dict[str, list[str]]:
    planish = [sys.executable, "-m", "planish.optimizer.cli", "optimize", str(checkpoint)]
    return {
        "planish optimize --reference none": [*planish, "-o", str(folder / "planish"), "--reference", "none"],
        "optimum export": [*optimum_command(checkpoint, task), str(folder / "optimum")],
    }


if __name__ == "__main__":
    main()
