"""`report.html`: the table, what each pass did, what was undone and why, on one page that needs nothing else.

The report is made from manifest and lock only, so it is the same for equal builds; the latest timings are shown from
`measurements.json` beside it.
"""

from __future__ import annotations

from pathlib import Path

from planish.optimizer.output.lock import Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.system.staging import MEASUREMENTS


def write_report(folder: Path, manifest: Manifest, lock: Lock) -> None:
    """Write the report of an output into its folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html").render(manifest=manifest, lock=lock, measurements=MEASUREMENTS)
    (folder / "report.html").write_text(page, encoding="utf-8")
