"""`report.html`: results table, effects of each pass, and rolled back passes with reasons, on one self-contained page.

The report is made from manifest and lock only, so it is equal for equal builds. The latest timings are read from
`measurements.json` beside it.
"""

from __future__ import annotations

from pathlib import Path

from planish.optimizer.output.lock import Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.system.staging import MEASUREMENTS

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
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,  # of sections, which follow each other on the page
    )
    page = environment.get_template("report.html").render(
        sections=SECTIONS, manifest=manifest, lock=lock, measurements=MEASUREMENTS
    )
    (folder / "report.html").write_text(page.rstrip("\n"), encoding="utf-8")
