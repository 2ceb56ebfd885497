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
    """Say what changed from BEFORE to AFTER: .onnx files, or folders whose files are compared by name.

    Operators, borders, types and shapes of values, initializers (also what they hold), and size.
    """
    from planish.optimizer.cli.display import print_table
    from planish.optimizer.ir.diff import compare_files

    found = compare_files(before, after)
    if as_json:
        print_json({name: [asdict(change) for change in changes] for name, changes in found.items()})
        return
    for name, changes in found.items():
        if not changes:
            click.echo(f"{name}: nothing differs")
            continue
        rows = [(c.kind, c.name, _text(c.before), _text(c.after)) for c in changes]
        print_table(name, ("what", "name", str(before), str(after)), rows)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
