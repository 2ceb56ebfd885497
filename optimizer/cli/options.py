"""Options and arguments that several commands share, and the parsers of their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

from planish.optimizer.cli.completion import complete_budget, complete_expectation
from planish.optimizer.errors import UsageError


class Sectioned(click.Command):
    """A command whose help lists its options under headings."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Heading -> names of the parameters below it; those without one come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section; an option of a name that does not exist is a KeyError."""
        helped = ((parameter.name, parameter.get_help_record(ctx)) for parameter in self.get_params(ctx))
        records = {name: record for name, record in helped if record is not None}
        headed = {name for names in self.sections.values() for name in names}
        rest = [name for name in records if name not in headed]
        for heading, names in {**self.sections, "Other options": rest}.items():
            with formatter.section(heading):
                formatter.write_dl([records[name] for name in names])


# click would report an unreadable file as a usage error (exit code 2); it is bad input (3), which the driver raises.
existing = click.Path(path_type=Path, readable=False)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
shapes_option = click.option(
    "--shape", "shapes", multiple=True, metavar="AXIS=N,…", help="Sizes at which engines are timed; repeatable."
)
fix_option = click.option(
    "--fix",
    metavar="AXIS=N,…",
    help="Static sizes of axes: engines take no other size, and may be faster.",
)
keep_option = click.option(
    "--keep",
    multiple=True,
    metavar="METRIC>=X",
    shell_complete=complete_budget,
    help="Accuracy budget, e.g. cosine>=0.999; repeatable.",
)
expect_option = click.option(
    "--expect",
    shell_complete=complete_expectation,
    multiple=True,
    metavar="NAME=N",
    help="Fail unless this pass fires at N sites (fuse-attention=12), or the optimized graph has this operator N times "
    "(Attention=12).",
)


def parse_shapes(texts: Sequence[str]) -> list[dict[str, int]]:
    """Read `batch=1,sequence=128` texts."""
    return [_sizes(text) for text in texts]


def _sizes(text: str) -> dict[str, int]:
    pairs = [_axis(part, text) for part in text.split(",") if part.strip()]
    if len(dict(pairs)) < len(pairs) or not pairs:
        raise UsageError(f"cannot read the sizes {text!r}", advice="name each axis once: batch=1,sequence=128")
    return dict(pairs)


def _axis(part: str, text: str) -> tuple[str, int]:
    name, _, size = part.partition("=")
    # A past of 0 is the prefill; every other axis has at least one entry.
    if not size.strip().isdecimal() or (int(size) < 1 and name.strip() != "past"):
        raise UsageError(f"cannot read the sizes {text!r}", advice="write axis=n,…: batch=1,sequence=128")
    return name.strip(), int(size)


def parse_fixed(text: str | None) -> dict[str, int]:
    """Read one `batch=1,sequence=128` text; an empty dictionary for None."""
    return parse_shapes([text])[0] if text else {}


def print_json(value: Any) -> None:
    """The machine-readable result, alone on standard output."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
