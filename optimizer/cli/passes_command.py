"""`planish passes`."""

from __future__ import annotations

import click

from planish.optimizer.cli.options import json_flag, print_json
from planish.optimizer.registry import PASSES


@click.command("passes")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_flag
def command(markdown: bool, as_json: bool) -> None:
    """List the passes: what each does, its options, where it comes from."""
    from planish.optimizer.cli.catalogue import entries, print_catalogue

    found = entries(PASSES)
    if as_json:
        print_json(found)
    else:
        print_catalogue("passes", found, markdown=markdown)
