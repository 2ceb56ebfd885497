"""`planish backends`."""

from __future__ import annotations

import click

from planish.optimizer.cli.options import json_flag, print_json
from planish.optimizer.interfaces.registry import BACKENDS


@click.command("backends")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_flag
def command(markdown: bool, as_json: bool) -> None:
    """List the targets: the runtimes that engines are built for, and whether they run here."""
    from planish.optimizer.cli.catalogue import entries, print_catalogue

    found = entries(BACKENDS)
    if as_json:
        print_json(found)
    else:
        print_catalogue("backends", found, markdown=markdown)
