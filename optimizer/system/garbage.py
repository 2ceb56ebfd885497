"""The garbage collector while a model is lowered: a million objects are made that stay, and few die."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from planish.optimizer.system import interrupts

_SELDOM = (200_000, 50, 1_000)
"""Thresholds of the collector while tracing: a twentieth of its time goes into looking at what stays."""


class _State:
    """State of the collector of this process, which all threads share."""

    lock = threading.Lock()
    seldom = 0
    """Blocks in which it runs seldom."""
    usual = (0, 0, 0)
    """The caller's thresholds."""
    blocks = 0
    frozen = False
    """The objects of the first block are frozen, and nobody else's."""


@contextmanager
def collecting_seldom() -> Iterator[Callable[[], None]]:
    """Run the collector seldom, until the function that is given is called or the block ends.

    That function has everything that is there left out of further collections. Behind the block thresholds and objects
    are treated as before: a caller whose own objects are frozen keeps them so.
    """
    _begin()
    settled = False

    def settle() -> None:
        nonlocal settled
        if not settled:
            settled = True
            _restore_thresholds()
            _freeze()

    try:
        yield settle
    finally:
        if not settled:
            _restore_thresholds()
        _end()


def _begin() -> None:
    with _State.lock:
        if not _State.seldom:
            _State.usual = gc.get_threshold()
            gc.set_threshold(*_SELDOM)
        _State.seldom += 1
        _State.blocks += 1


def _restore_thresholds() -> None:
    with _State.lock:
        _State.seldom -= 1
        if not _State.seldom:
            gc.set_threshold(*_State.usual)


def _freeze() -> None:
    # `gc.unfreeze` knows no owners: where the caller has frozen objects, ours are not added to them.
    with interrupts.holding_interrupts(), _State.lock:  # no exception gets out of the collector
        if _State.frozen or not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            _State.frozen = True


def _end() -> None:
    with _State.lock:
        _State.blocks -= 1
        # A process of ours, which another one watches, ends soon. Python collects at its end: of a million objects that
        # are not frozen that takes seconds.
        if _State.frozen and not _State.blocks and not interrupts.watched():
            gc.unfreeze()
            _State.frozen = False
