"""A measure of the user's own: a command that is given an engine's folder and prints a number."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.errors import BadInput, UsageError

PLACE = "{}"
"""Where the folder goes in the command; behind it if it does not say."""
_SHOWN = 200


@dataclass(frozen=True)
class Evaluation:
    """A command as a shell would read it; it is run without a shell."""

    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Evaluation:
        """UsageError if quotes do not match, or there is nothing."""
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"cannot read the command {text!r} ({error})", where="--evaluate") from None
        if not words:
            raise UsageError("the command is empty", where="--evaluate")
        return cls(words if any(PLACE in word for word in words) else (*words, PLACE))

    def __str__(self) -> str:
        """The command again."""
        return shlex.join(self.words)

    def score(self, folder: Path) -> float:
        """The number on the last line that the command prints; BadInput if it fails or prints none."""
        words = [word.replace(PLACE, str(folder)) for word in self.words]
        where = f"--evaluate {self}"
        try:
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
    """Metrics of a score: itself, and as a multiple of the plain engine's where that is asked for."""
    return {"score": score} | ({} if plain is None else {"score_ratio": score / plain if plain else math.nan})


def _last(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1].strip()[:_SHOWN] if lines else ""
