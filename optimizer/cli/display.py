"""Tables on standard output, progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from planish.optimizer.compilation.progress import Progress
from planish.optimizer.errors import printable
from planish.optimizer.output.lock import Selection, Speed
from planish.optimizer.output.manifest import Manifest


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A bar on a terminal, a line per stage otherwise; nothing if ``quiet``."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        start = time.perf_counter()
        yield lambda name, done, total: print(
            f"[{time.perf_counter() - start:6.1f} s] {done + 1}/{total} {name}", file=sys.stderr, flush=True
        )


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> None:
    """A table: drawn on a terminal, as wide as that is; as Markdown; else plain, a line for each row."""
    import shutil

    # Control characters in names of an untrusted file could send escape sequences to the terminal.
    title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
    if markdown:
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        print("\n".join(f"| {' | '.join(cell.replace(chr(10), '<br>') for cell in row)} |" for row in rows))
    elif sys.stdout.isatty():
        print(drawn(title, columns, rows, shutil.get_terminal_size().columns))
    else:
        print(plain(title, columns, rows))


def plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The title, the columns, then a line for each row, however long: two blanks or more between cells, `-` for an
    empty one."""
    cells = [[" ".join("; ".join(cell.splitlines()).split()) or "-" for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([title, *lines])


def drawn(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """The table as it is drawn on a terminal of ``width`` characters; a list of rows where columns would be too narrow
    for their words."""
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    longest = [_longest_word([name, *cells]) for name, cells in zip(columns, zip(*rows, strict=True), strict=False)]
    if sum(longest) + 3 * len(longest) > width:
        return _listed(title, columns, rows, width)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, least in zip(columns, longest or [1] * len(columns), strict=True):
        table.add_column(column, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


_BREAKABLE = 20
"""Words longer than this (texts of pipelines, paths) may be broken."""


def _longest_word(cells: Sequence[str]) -> int:
    return max((min(len(word), _BREAKABLE) for cell in cells for word in cell.split()), default=1)


def _listed(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Each row as a heading, its first cell, and a line for each other cell that is not empty."""
    import textwrap

    indent = max(len(name) for name in columns[1:]) + 4
    lines = textwrap.wrap(title, width)
    for head, *cells in rows:
        lines += ["", *textwrap.wrap(head, width)] if head else []
        for name, text in zip(columns[1:], cells, strict=True):
            first = f"  {name}".ljust(indent)
            for number, part in enumerate(text.splitlines()):
                begin = " " * indent if number else first
                lines += textwrap.wrap(part, width, initial_indent=begin, subsequent_indent=" " * indent)
    return "\n".join(lines)


def print_result(manifest: Manifest, choices: Mapping[str, Selection], latencies: Mapping[str, Any]) -> None:
    """The result table of a build: one row for each engine and timed shape."""
    rows: list[tuple[str, ...]] = []
    for name, record in manifest.targets.items():
        rows.append(
            (
                record.target,
                f"{record.shipped}: {record.why}",
                f"{record.size_bytes / 1e6:.1f} MB",
                fidelity_text(record.comparison) or record.checked_with,
                record.asked() or "none asked",
                _speeds(choices[name].measured) or "not measured",
                _latency(latencies.get(name, {})),
            )
        )
        if record.arithmetic != "f32":
            rows.append(("", f"computes in {record.arithmetic}, and so does what it is compared with", *[""] * 5))
        opened = record.as_loaders_open
        if opened is not None:
            broken = "OUTSIDE the budget" if opened.comparison else "FAILS"
            held = f"{broken}: {opened.violations[0]}" if opened.violations else "within the budget"
            what = f"loaded without options, which is {opened.target}: {held}; properties to give lie beside the engine"
            rows.append(("", what, "", fidelity_text(opened.comparison), *[""] * 3))
        rows += [("", f"rolled back {undone.text}: {undone.reason}", *[""] * 5) for undone in record.rolled_back]
        for trial in choices[name].tried:
            verdict = f"tried {trial.passes}: {'kept' if trial.kept else 'not kept'}, {trial.why}"
            what = verdict if trial.raced else f"not tried {trial.passes}: {trial.why}"
            rows.append(("", what, *[""] * 3, _speeds(trial.measured), ""))
    columns = ("target", "shipped", "size", "fidelity", "budget", "speed-up over plain", "median ms")
    print_table(f"{manifest.source.architecture}, {manifest.task}", columns, rows)


def _speeds(measured: Sequence[Speed]) -> str:
    return "\n".join(f"{s.speedup:.2f}x [{s.low:.2f}, {s.high:.2f}] at {s.shape}" for s in measured)


def _latency(shapes: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{timings['optimized']['median_ms']:.2f} ({timings['plain']['median_ms']:.2f} plain)"
        for timings in shapes.values()
    )


def fidelity_text(comparison: Mapping[str, Mapping[str, float]]) -> str:
    """A few metrics of each output."""
    shown = ("max_abs", "cosine", "top1", "perplexity", "kl", "greedy", "score", "score_ratio")
    return "\n".join(
        f"{output}: " + " ".join(f"{metric} {metrics[metric]:.6g}" for metric in shown if metric in metrics)
        for output, metrics in comparison.items()
    )
