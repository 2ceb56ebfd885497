"""The fuzzer of checkpoints: a case is the same whenever its seed is, and a few of them end well."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.fuzz import Wrong, checkpoints, harness


def digest(folder: Path) -> str:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_a_seed_is_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SPECIES", checkpoints.SPECIES[:2])
    checkpoints.originals.cache_clear()
    digests = []
    for turn in ("first", "second"):
        for seed in range(30):
            checkpoints.write(random.Random(seed), tmp_path / turn / str(seed))
            digests.append(digest(tmp_path / turn / str(seed)))
    checkpoints.originals.cache_clear()
    assert digests[:30] == digests[30:]
    assert len(set(digests)) > 20


def test_another_weight_than_transformers_loads_is_wrong() -> None:
    import numpy as np

    checkpoints.compare("w", np.ones(3), np.ones(3))
    with pytest.raises(Wrong, match="w differs at 1 of 3 places"):
        checkpoints.compare("w", np.array([1, 1, 2.0]), np.ones(3))


@pytest.mark.breadth
def test_some_hundred_checkpoints_end_well() -> None:
    report = harness.fuzz("checkpoints", range(200))
    assert report.failures == [], report
