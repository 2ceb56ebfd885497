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
    help="The passes to run: a,b{k=v},c.",
)
@keep_option
@click.option("-o", "--output", "repro", type=existing, help="The file to write, SOURCE.repro.onnx if not given.")
@json_flag
def command(source: Path, pipeline: str, keep: tuple[str, ...], repro: Path | None, as_json: bool) -> None:
    """Find the first pass on SOURCE (an .onnx file or an output), and its first site, that exceeds the budget.

    Writes a model of a few nodes that reproduces the failure, and prints the command for it. Exits with code 1 if a
    pass exceeds the budget.
    """
    from planish.optimizer.driver.bisect import bisect
    from planish.optimizer.errors import CheckFailed

    culprit = bisect(source, pipeline, repro or source.with_suffix(".repro.onnx"), keep=keep)
    if as_json:
        print_json(None if culprit is None else asdict(culprit))
    if culprit is None:
        click.echo("no pass exceeds the budget", err=as_json)
        return
    if not as_json:
        click.echo(f"pass       {culprit.text}")
        click.echo(f"site       {culprit.site or 'unknown: the pass has no single sites'}")
        click.echo(f"because    {'; '.join(culprit.violations)}")
        click.echo(f"found by   {culprit.runs} runs of the pass")
        click.echo(f"shown by   {culprit.command}   ({culprit.nodes} nodes)")
    raise CheckFailed(f"{culprit.text} exceeds the budget", where=source, advice=f"reproduce with: {culprit.command}")
