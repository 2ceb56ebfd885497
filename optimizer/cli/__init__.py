"""The command line: thin.

Importing this package imports next to nothing: until `main` runs, Ctrl-C ends the process as it ends any Python
program.
"""

from __future__ import annotations

import sys
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every way to fail ends in one line and the documented exit code.

    Without ``arguments`` this process is the user's command: signals end it, and on Linux another does the work.
    """
    from planish.optimizer.system import interrupts

    if arguments is None:
        _take_over()
    else:
        interrupts.begin()
    from planish.optimizer.cli.failures import exit_code_of, finish

    try:
        from planish.optimizer.cli.group import cli

        code = int(cli.main(args=arguments, prog_name="planish", standalone_mode=False) or 0)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost handler
        code = exit_code_of(error)
    sys.exit(finish(code))


def _take_over() -> None:
    from planish.optimizer.system import interrupts

    if sys.platform == "linux":
        from planish.optimizer.cli.supervising import supervise

        supervise()
    else:
        interrupts.answer(interrupts.answered())
    from planish.optimizer.cli.failures import open_standard_streams

    open_standard_streams()


def __getattr__(name: str) -> Any:
    """The group and its table, which the import of click would delay."""
    if name in ("cli", "COMMANDS", "LazyGroup"):
        from planish.optimizer.cli import group

        return getattr(group, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
