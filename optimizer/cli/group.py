"""The commands: each lives in a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import click

from planish.optimizer.cli.failures import UNREAD

COMMANDS: Mapping[str, str] = {
    "optimize": "Compile a checkpoint or an ONNX file to checked, timed engines.",
    "verify": "Check the engines of an output on this machine.",
    "bench": "Time engines and models in alternation.",
    "run": "Run an engine: labels, embeddings, answers, texts.",
    "opt": "Run a pipeline over one ONNX graph.",
    "explain": "Show where each pass fired or refused, and why.",
    "bisect": "Find the pass, and its site, that exceeds the budget.",
    "diff": "Show the differences between two models.",
    "passes": "List the passes and their options.",
    "backends": "List the targets and their options.",
    "doctor": "Show installed libraries, machine features, and missing packages.",
}
"""Name of each command -> its summary; the module of a command has the command's name."""


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

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As click does; but Ctrl-C, for which click prints an empty line, goes to `main`."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except KeyboardInterrupt:
            raise click.Abort from None

    def invoke(self, ctx: click.Context) -> Any:
        """The same while the command runs. What nobody reads is no failed check: click would end with 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise click.exceptions.Exit(UNREAD) from None
        except KeyboardInterrupt:
            raise click.Abort from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown name gets the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from planish.optimizer.interfaces.option_text import did_you_mean

            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(metadata.version("planish"), "-V", "--version", prog_name="planish")
def cli() -> None:
    """Planish compiles trained Transformers to smaller, faster engines, each checked against the original."""
