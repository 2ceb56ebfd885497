"""`planish doctor`."""

from __future__ import annotations

import click

from planish.optimizer.cli.options import json_flag, print_json


@click.command("doctor")
@json_flag
def command(as_json: bool) -> None:
    """Show installed libraries, CPU and GPU features, the targets that run on this machine, and missing packages."""
    from planish.optimizer.cli.display import print_table
    from planish.optimizer.driver.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding.__dict__ for finding in findings])
        return
    rows = [(finding.subject, finding.state, finding.detail, finding.advice) for finding in findings]
    print_table("this machine", ("subject", "state", "what was found", "what to do"), rows)
