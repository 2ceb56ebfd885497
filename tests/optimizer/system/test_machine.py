"""What memory is left is read off the machine and every control group above this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.optimizer.errors import OutOfResources
from planish.optimizer.system.machine import available_memory, demand_memory

MEGABYTE = 1 << 20


def group(folder: Path, limit: str, usage: int, *, inactive: int = 0, version: int = 2) -> None:
    """The files of a control group, sizes in MiB."""
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit if limit == "max" else str(int(limit) * MEGABYTE))
    (folder / names[1]).write_text(f"{usage * MEGABYTE}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {inactive * MEGABYTE}\n")


def test_the_tightest_group_counts_and_pages_of_files_do_not(tmp_path: Path) -> None:
    group(tmp_path / "outer", "100", 60, inactive=20)
    group(tmp_path / "outer" / "inner", "max", 10)
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    assert available_memory(tmp_path, tmp_path / "membership") == 60 * MEGABYTE


def test_groups_of_the_first_version_count_as_well(tmp_path: Path) -> None:
    group(tmp_path / "memory" / "job", "30", 20, version=1)
    (tmp_path / "membership").write_text("5:cpu:/other\n4:memory:/job\n")
    assert available_memory(tmp_path, tmp_path / "membership") == 10 * MEGABYTE


def test_a_container_that_sees_only_its_own_group_is_limited_by_it(tmp_path: Path) -> None:
    group(tmp_path, "50", 40)
    (tmp_path / "membership").write_text("0::/kubepods/not-mounted-here\n")
    assert available_memory(tmp_path, tmp_path / "membership") == 10 * MEGABYTE


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "none") > 10 * MEGABYTE


def test_what_does_not_fit_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.optimizer.system.machine.available_memory", lambda: 2_000_000_000)
    demand_memory(2_000_000_000, "it", "nothing")
    with pytest.raises(OutOfResources, match=r"the engine needs 3\.5 GB of memory, 2\.0 GB are available; use less"):
        demand_memory(3_500_000_000, "the engine", "use less")
