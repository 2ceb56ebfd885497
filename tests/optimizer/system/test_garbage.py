"""The garbage collector behind a call is as it was before."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from planish.optimizer.system import garbage, interrupts
from planish.optimizer.system.garbage import collecting_seldom


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """Whoever ran in this process before may have left objects frozen."""
    gc.unfreeze()
    before = gc.get_threshold()
    yield
    assert gc.get_threshold() == before
    gc.unfreeze()


@pytest.mark.slow
def test_the_collector_runs_seldom_until_all_is_settled() -> None:
    before = gc.get_threshold()
    with collecting_seldom() as settle:
        assert gc.get_threshold() > before
        assert gc.get_freeze_count() == 0
        settle()
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() > 1000
        settle()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_an_exception_leaves_nothing_behind() -> None:
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError), collecting_seldom():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), collecting_seldom() as settle:
        settle()
        raise ZeroDivisionError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_objects_that_the_caller_has_frozen_stay_so() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with collecting_seldom() as settle:
        settle()
    assert gc.get_freeze_count() == before > 0


def test_calls_in_two_threads() -> None:
    """The first ends while the second still works: only the last one may undo what both need."""
    before, entered, leave = gc.get_threshold(), threading.Event(), threading.Event()

    def other() -> None:
        with collecting_seldom() as settle:
            entered.set()
            leave.wait(60)
            settle()

    thread = threading.Thread(target=other)
    with collecting_seldom() as settle:
        thread.start()
        assert entered.wait(60)
        settle()
        assert gc.get_threshold() > before
    assert gc.get_freeze_count() > 0
    leave.set()
    thread.join()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_a_process_of_ours_is_not_made_to_collect_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(interrupts._state, "reports", writing)
    with collecting_seldom() as settle:
        settle()
    os.close(reading)
    os.close(writing)
    assert gc.get_freeze_count() > 0
    assert garbage._State.frozen
    monkeypatch.setattr(interrupts._state, "reports", None)
    with collecting_seldom():
        pass
    assert gc.get_freeze_count() == 0
