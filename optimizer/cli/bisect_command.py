"""`planish bisect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from planish.optimizer.cli.completion import complete_pipeline
from planish.optimizer.cli.options import existing, json_flag, keep_option, print_json


@click.command("bisect")
@click.argument("source", type=existing)
@click.option(
    "--pipeline",
    metavar="TEXT",
    shell_complete=complete_pipeline,
    required=True,
    help="The passes to try, as text: a,b{k=v},c.",
)
@keep_option
@click.option("-o", "--output", "repro", type=existing, help="The file to write, SOURCE.repro.onnx if not given.")
@json_flag
def command(source: Path, pipeline: str, keep: tuple[str, ...], repro: Path | None, as_json: bool) -> None:
    """Find the first pass on SOURCE, an .onnx file or an output, and the first of its sites, that leaves the budget.

    A model of a few nodes that fails by itself is written, and the command that shows it is told. Exits 1 if one was
    found.
    """
    from planish.optimizer.driver.bisect import bisect
    from planish.optimizer.errors import CheckFailed

    found = bisect(source, pipeline, repro or source.with_suffix(".repro.onnx"), keep=keep)
    if as_json:
        print_json(None if found is None else asdict(found))
    if found is None:
        click.echo("every pass stays inside the budget", err=as_json)
        return
    if not as_json:
        click.echo(f"pass       {found.text}")
        click.echo(f"site       {found.site or 'unknown: it does not go from site to site'}")
        click.echo(f"because    {'; '.join(found.violations)}")
        click.echo(f"found by   {found.runs} runs of the pass")
        click.echo(f"shown by   {found.command}   ({found.nodes} nodes)")
    raise CheckFailed(f"{found.text} leaves the budget", where=source, advice=f"reproduce with: {found.command}")
