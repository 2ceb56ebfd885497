"""Options of passes chosen by the tuning table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from planish.optimizer.interfaces.pass_base import TuningQuery
from planish.optimizer.pipeline.instruments import Instrument, Step
from planish.optimizer.timing.tuning_table import Profile


class Tune(Instrument):
    """Give each pass the options that its target runs fastest, unless they were written out."""

    def __init__(self, profile: Profile, shapes: Sequence[Mapping[str, int]]) -> None:
        """``shapes`` are sizes of axes at which the engine will be used."""
        self.profile = profile
        self.shapes = shapes

    def before(self, step: Step) -> None:
        """Ask what the pass wants to know of the graph in front of it."""
        asked: dict[str, list[TuningQuery]] = {}
        for sizes in self.shapes:
            for question in step.pass_.tuning_queries(step.model, sizes):
                asked.setdefault(question.option, []).append(question)
        usual = {option.name: option.default for option in fields(step.pass_)}
        open_ = {option: found for option, found in asked.items() if getattr(step.pass_, option) == usual[option]}
        text = str(step.pass_)
        step.pass_ = replace(step.pass_, **{option: self.profile.best(step.pass_, q) for option, q in open_.items()})
        step.rest = str(step.pass_) + step.rest.removeprefix(text)
