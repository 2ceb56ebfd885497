"""Engines that may be shipped for a target, before one of them is chosen."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.engine_check import Fidelity
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.output.lock import LockedPass, Selection
from planish.optimizer.pipeline.pipeline import Outcome, PassReport
from planish.optimizer.system.machine import instruction_set

NOT_CHECKED = "NOT CHECKED"
"""What is said of an engine that was compared with nothing."""
EVALUATION = "own measure"
"""Where the user's own measure stands among the comparisons of components."""
OFFLOADED = "weights stay in their files"
"""Why something was not done that needs all of them in memory."""


@dataclass(frozen=True)
class Candidate:
    """An engine that may be shipped: what made it, where it stands, and how it compares with the reference."""

    outcomes: Mapping[str, Outcome]
    """By component."""
    tried: str
    """The passes that were tried behind the pipeline, or instead of some of it; nothing for the pipeline alone."""
    place: Path
    budgets: Mapping[str, Budget]
    fidelity: Fidelity

    @property
    def violations(self) -> list[str]:
        """What of the budgets does not hold."""
        return self.fidelity.violations(self.budgets)

    def obstacle(self, without: Candidate) -> str | None:
        """Why the passes that were tried cannot win against the engine without them, before anything is timed."""
        own = _own(self.outcomes, without.outcomes)
        undone = next((report.rolled_back for report in own if report.rolled_back is not None), None)
        if undone is not None:
            return f"undone: {undone}"
        if not went_on(self.outcomes, without.outcomes):
            refused = next((refusal.reason for report in own for refusal in report.refusals), "no place for it")
            return f"changed nothing: {refused}"
        return f"outside the budget: {self.violations[0]}" if self.violations else None


def _own(outcomes: Mapping[str, Outcome], before: Mapping[str, Outcome]) -> list[PassReport]:
    """What was done that is not the beginning of ``before`` as well."""
    found: list[PassReport] = []
    for name, outcome in outcomes.items():
        pairs = itertools.zip_longest(outcome.reports, before[name].reports)
        alike = itertools.takewhile(lambda pair: None not in pair and pair[0].text == pair[1].text, pairs)
        found += outcome.reports[sum(1 for _ in alike) :]
    return found


def went_on(outcomes: Mapping[str, Outcome], before: Mapping[str, Outcome]) -> bool:
    """Whether passes that are not those of ``before`` changed a component."""
    return any(report.modified and not report.rolled_back for report in _own(outcomes, before))


def unmeasured_choice(
    target: Backend, engine: Candidate, shipped: Literal["optimized", "plain"], why: str
) -> Selection:
    """A choice for which nothing was measured."""
    return Selection(
        target=str(target),
        pipelines={name: str(outcome.applied) for name, outcome in engine.outcomes.items()},
        rolled_back=[
            LockedPass(component=name, text=report.text, reason=report.rolled_back)
            for name, outcome in engine.outcomes.items()
            for report in outcome.reports
            if report.rolled_back is not None
        ],
        shipped=shipped,
        why=why,
        machine=instruction_set(),
        measured=[],
    )


def replace_folder(source: Path, place: Path) -> None:
    """Let a copy of a folder take the place of another."""
    shutil.rmtree(place)
    shutil.copytree(source, place)
