"""Tiny checkpoints of the tasks of texts, and their engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from planish.optimizer import optimize
from planish.optimizer.inference.session import open_task
from planish.optimizer.inference.text_tasks import TextTasks
from tests.clocks import all_equal
from tests.conftest import with_tokenizer
from tests.zoo import Species, build

Made = Callable[[str], tuple[TextTasks, Path]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Name of a task -> the opened task and its checkpoint; each is built once, and nothing is timed."""
    built: dict[str, tuple[TextTasks, Path]] = {}

    def make(name: str) -> tuple[TextTasks, Path]:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = with_tokenizer(build(Species("bert", name), folder / "checkpoint"))
            optimize(checkpoint, folder / "out", clock=all_equal)
            task = open_task(folder / "out")
            assert isinstance(task, TextTasks)
            built[name] = task, checkpoint
        return built[name]

    return make
