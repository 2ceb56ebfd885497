"""User-defined metric: a command that gets an engine's folder and prints a number."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.errors import BadInput, UsageError

PLACE = "{}"
"""Placeholder for the folder in the command; without it the folder is the last argument."""
_SHOWN = 200


@dataclass(frozen=True)
class Evaluation:
    """A command in shell syntax, run without a shell."""

    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Evaluation:
        """Read a command; UsageError for unbalanced quotes or an empty command."""
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"cannot read the command {text!r} ({error})", where="--evaluate") from None
        if not words:
            raise UsageError("the command is empty", where="--evaluate")
        return cls(words if any(PLACE in word for word in words) else (*words, PLACE))

    def __str__(self) -> str:
        """The command as text."""
        return shlex.join(self.words)

    def score(self, folder: Path) -> float:
        """The number on the last line of the command's output; BadInput if it fails or prints none."""
        words = [word.replace(PLACE, str(folder)) for word in self.words]
        where = f"--evaluate {self}"
        try:
            # No shell: the folder's name may hold characters with a meaning in a shell.
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise BadInput(f"the command cannot be run ({error.strerror})", where=where) from error
        if done.returncode:
            raise BadInput(
                f"the command failed with {done.returncode}: {_last(done.stderr or done.stdout)}", where=where
            )
        try:
            number = float(_last(done.stdout))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise BadInput(
                f"the last line is no number but {_last(done.stdout)!r}", where=where, advice="print the score last"
            )
        return number


def scored(score: float, plain: float | None) -> Mapping[str, float]:
    """Metrics of a score: its value, and the ratio to the plain engine's if that is known."""
    return {"score": score} | ({} if plain is None else {"score_ratio": score / plain if plain else math.nan})


def _last(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1].strip()[:_SHOWN] if lines else ""
