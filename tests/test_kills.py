"""A few rounds of `tests.kills`."""

from __future__ import annotations

import pytest

from tests import kills


@pytest.mark.breadth
@pytest.mark.slow
def test_killed_builds_leave_nothing_torn_and_nothing_behind() -> None:
    assert kills.run(12, 0, quiet=True) == []
