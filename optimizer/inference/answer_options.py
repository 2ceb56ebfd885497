"""Options of `planish run` and of `load`'s models: what a user may ask for, and which of it a task takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Self, TypedDict

from planish.optimizer.runtime.generation import Sampling


class TaskOption(Enum):
    """Something that a user may ask for, and that not every task takes."""

    PROMPT = "a prompt of the checkpoint's by name"
    LOGITS = "logits instead of probabilities"
    GENERATION = "the number of new tokens, and sampling"
    CHOICES = "several answers to choose from"


class AnswerFields(TypedDict, total=False):
    """Options by name, as a call or a command line gives them."""

    prompt: str | None
    """The name of a prompt of the checkpoint's."""
    logits: bool
    """True for scores as the head gives them, without softmax or sigmoid."""
    max_new_tokens: int | None
    """Most tokens that an engine writes."""
    temperature: float
    top_k: int
    top_p: float
    seed: int
    """These four are those of `Sampling`."""


@dataclass(frozen=True)
class AnswerOptions:
    """Values of the options for all requests; `choices` is no such option: every request has its own."""

    prompt: str | None = None
    """The name of a prompt of the checkpoint's."""
    logits: bool = False
    """True if scores are logits, as the head gives them, without softmax or sigmoid."""
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options of `AnswerFields`; TypeError for another name."""
        unknown = [name for name in given if name not in AnswerFields.__annotations__]
        if unknown:
            raise TypeError(f"unexpected option {unknown[0]!r}; there are: {', '.join(AnswerFields.__annotations__)}")
        sampling = {option.name: given[option.name] for option in fields(Sampling) if option.name in given}
        others = {name: value for name, value in given.items() if name not in sampling}
        return cls(**others, sampling=Sampling(**sampling))

    @property
    def for_generation(self) -> bool:
        """True if an option for engines that generate differs from its default."""
        return self.max_new_tokens is not None or self.sampling != Sampling()
