"""`planish backends`."""

from __future__ import annotations

import click

from planish.optimizer.cli.options import json_flag, print_json
from planish.optimizer.interfaces.registry import BACKENDS


@click.command("backends")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_flag
def command(markdown: bool, as_json: bool) -> None:
    """List the targets (runtimes that engines are built for), with their availability on this machine."""
    from planish.optimizer.cli.catalogue import entries, print_catalogue

    targets = entries(BACKENDS)
    if as_json:
        print_json(targets)
    else:
        print_catalogue("backends", targets, markdown=markdown)
