"""Options of `planish run` and of `load`'s models: what a user may ask for, and which of it a task takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from planish.optimizer.runtime.generation import Sampling


class TaskOption(Enum):
    """Something that a user may ask for, and that not every task takes."""

    PROMPT = "a prompt of the checkpoint's by name"
    LOGITS = "logits instead of probabilities"
    GENERATION = "the number of new tokens, and sampling"
    CHOICES = "several answers to choose from"


@dataclass(frozen=True)
class AnswerOptions:
    """Values of the options for all requests; `choices` is no such option: every request has its own."""

    prompt: str | None = None
    """The name of a prompt of the checkpoint's."""
    logits: bool = False
    """True if scores are logits, as the head gives them, without softmax or sigmoid."""
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def for_generation(self) -> bool:
        """True if an option for engines that generate differs from its default."""
        return self.max_new_tokens is not None or self.sampling != Sampling()
