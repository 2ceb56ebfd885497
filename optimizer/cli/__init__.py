"""The command line: thin. Each command lives in a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib import metadata

import click

COMMANDS: Mapping[str, str] = {
    "optimize": "Turn a checkpoint or an ONNX file into checked, measured engines.",
    "verify": "Check the engines of an output again, on this machine.",
    "bench": "Time engines and models side by side.",
    "run": "Ask an engine: labels, embeddings, answers, texts.",
    "opt": "Run a pipeline over one ONNX graph.",
    "explain": "Say where each pass fired, where it refused, and why.",
    "bisect": "Find the pass, and the site, that leaves the budget.",
    "diff": "Say what changed between two models.",
    "passes": "List the passes and their options.",
    "backends": "List the targets and their options.",
    "doctor": "Say what is installed, what this machine can do, and what is missing.",
}
"""Name of each command -> what it does; the module of a command has its name."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that help comes at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of the command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"planish.optimizer.cli.{cmd_name}_command").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown name gets the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from planish.optimizer.spec import did_you_mean

            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(metadata.version("planish"), "-V", "--version", prog_name="planish")
def cli() -> None:
    """Planish compiles trained Transformers into smaller, faster engines, each checked against the original."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every way to fail ends in one line and the documented exit code."""
    from planish.optimizer.cli.failures import exit_code_of

    try:
        sys.exit(cli.main(args=arguments, prog_name="planish", standalone_mode=False) or 0)
    except Exception as error:  # noqa: BLE001 - the outermost handler: everything is turned into a line and a code
        sys.exit(exit_code_of(error))
