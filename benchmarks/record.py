"""Results: as JSON with versions and machine, and as a table, in a folder for each instruction set."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planish.optimizer.cli.display import print_table
from planish.optimizer.interfaces import registry
from planish.optimizer.system.machine import cores, instruction_set, library_versions

_FAMILIES = {
    "amx_int8": "amx",
    "avx512_bf16": "avx512-bf16",
    "avx512_vnni": "avx512-vnni",
    "avx512f": "avx512",
    "avx2": "avx2",
}


def family() -> str:
    """The instruction set that decides which kernels run here."""
    flags = instruction_set().split()
    return next((name for flag, name in _FAMILIES.items() if flag in flags), platform.machine())


def results() -> Path:
    """The folder of what is measured on processors with these instructions: `results/avx512-bf16`."""
    folder = Path(__file__).parent / "results" / family()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def record(
    name: str,
    what: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Any,
    command: str | None = None,
) -> None:
    """Write `NAME.json` and `NAME.md`, and print the table; ``command`` is NAME if not given."""
    folder = results()
    head = {
        "what": what,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "libraries": library_versions(registry.libraries()),
    }
    (folder / f"{name}.json").write_text(json.dumps(head | {"figures": figures}, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {what}", "", f"{head['date']}, {machine()}; `python -m benchmarks.{command or name}`.", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print_table(what, columns, rows)


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure and its axes, whose file will have the same bytes each time (`metadata={"Date": None}`)."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "planish"
    figure, axes = pyplot.subplots(figsize=(width, height))
    return figure, axes


def settle_memory() -> None:
    """Drop what the system keeps of files and put free memory together, where we may.

    Between other files' pages it is luck where the weights of a process lie: equal engines differed by up to 8 %.
    """
    with suppress(OSError):
        os.sync()
        for knob, value in (("drop_caches", "3"), ("compact_memory", "1")):
            Path("/proc/sys/vm", knob).write_text(value)


def machine() -> str:
    """The processor, what it can do, and how many of its cores are ours."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {cores()} cores, {instruction_set()}"
