"""`planish verify`."""

from __future__ import annotations

from pathlib import Path

import click

from planish.optimizer.cli.options import existing, json_flag, print_json
from planish.optimizer.errors import CheckFailed


@click.command("verify")
@click.argument("out", type=existing)
@json_flag
def command(out: Path, as_json: bool) -> None:
    """Check the engines in OUT on this machine: file hashes, then outputs against the stored reference."""
    from planish.optimizer.cli.display import fidelity_text, print_table, progress_bar
    from planish.optimizer.driver.verify import verify
    from planish.optimizer.output.manifest import figures

    with progress_bar(quiet=as_json) as progress:
        verdicts = verify(out, progress=progress)
    metrics = {name: {} if v.comparison is None else figures(v.comparison) for name, v in verdicts.items()}
    if as_json:
        print_json(
            {
                name: {"target": v.target, "comparison": metrics[name], "problems": v.problems, "note": v.note}
                for name, v in verdicts.items()
            }
        )
    else:
        rows = [
            (
                v.target,
                "failed" if v.problems else "ok",
                fidelity_text(metrics[name]),
                "\n".join(filter(None, [*v.problems, v.note])),
            )
            for name, v in verdicts.items()
        ]
        print_table(str(out), ("target", "verdict", "fidelity", "note"), rows)
    problems = [f"{name}: {problem}" for name, v in verdicts.items() for problem in v.problems]
    if problems:
        raise CheckFailed("; ".join(problems), where=out, advice="build it again")
