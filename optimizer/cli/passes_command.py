"""`planish passes`."""

from __future__ import annotations

import click

from planish.optimizer.cli.completion import complete_passes
from planish.optimizer.cli.options import json_flag, print_json
from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces.registry import PASSES


@click.command("passes")
@click.argument("name", required=False, shell_complete=complete_passes)
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_flag
def command(name: str | None, markdown: bool, as_json: bool) -> None:
    """List the passes, or describe the pass NAME: its rewrite, a graph before and after, its options."""
    from planish.optimizer.cli.catalogue import entries, entry_called, print_catalogue, print_entry

    if name is not None:
        if markdown:
            raise UsageError("a single pass is told as text", where="--markdown", advice="leave it out, or the name")
        entry = entry_called(PASSES, name)
        print_json(entry) if as_json else print_entry(entry)
        return
    passes = entries(PASSES)
    if as_json:
        print_json(passes)
    else:
        print_catalogue("passes", passes, markdown=markdown)
