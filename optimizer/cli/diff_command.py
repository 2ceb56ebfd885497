"""`planish diff`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from planish.optimizer.cli.options import existing, json_flag, print_json


@click.command("diff")
@click.argument("before", type=existing)
@click.argument("after", type=existing)
@json_flag
def command(before: Path, after: Path, as_json: bool) -> None:
    """Show the differences between BEFORE and AFTER: .onnx files, or folders whose files are compared by name.

    Compares operators, inputs and outputs, types and shapes of values, initializers (content included), and size.
    """
    from planish.optimizer.cli.display import print_table
    from planish.optimizer.ir.diff import compare_files

    changes_by_file = compare_files(before, after)
    if as_json:
        print_json({name: [asdict(change) for change in changes] for name, changes in changes_by_file.items()})
        return
    for name, changes in changes_by_file.items():
        if not changes:
            click.echo(f"{name}: nothing differs")
            continue
        rows = [(c.kind, c.name, _text(c.before), _text(c.after)) for c in changes]
        print_table(name, ("what", "name", str(before), str(after)), rows)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
