"""`report.html`: results table, effects of each pass, and rolled back passes with reasons, on one page.

The report is made from manifest and lock only, so it is equal for equal builds. It shows the latest timings in a frame:
`measurements.html` beside it, which is made from `measurements.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planish.optimizer.output.lock import Lock
from planish.optimizer.output.manifest import Manifest

SECTIONS = (
    "engines",
    "passes",
    "reference",
    "built_with",
    "measurements",
)
"""Files of `sections/`, in the order in which they stand on the page."""


def write_report(folder: Path, manifest: Manifest, lock: Lock) -> None:
    """Write the report of an output into its folder."""
    page = _template("report.html").render(sections=SECTIONS, manifest=manifest, lock=lock)
    (folder / "report.html").write_text(page.rstrip("\n"), encoding="utf-8")


def write_measurements(folder: Path, measurements: Mapping[str, Any]) -> None:
    """Write the page of timings and rooflines of an output into its folder."""
    page = _template("measurements.html").render(measurements=measurements)
    (folder / "measurements.html").write_text(page, encoding="utf-8")


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,  # of sections, which follow each other on the page
    )
    return environment.get_template(name)
