"""Resources of the machine: memory within control groups, cores, instruction set, library versions."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from planish.optimizer.errors import OutOfResources

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
"""By version of control groups: limit, usage, and the page-cache part of the usage, which the kernel reclaims on demand
(kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst)."""


def available_memory(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Bytes that this process can allocate without being killed, with swap.

    ``root`` is the mount point of the control groups, ``membership`` the file with the groups of this process.
    """
    import psutil

    machine = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    rooms = [_room(folder, version) for folder, version in _groups(root, membership)]
    return max(0, min([machine, *(room for room in rooms if room is not None)]))


def demand_memory(needed: int, what: str, advice: str, where: object = None) -> None:
    """Raise OutOfResources if ``needed`` bytes are more than available; ``what`` is the consumer in the message."""
    available = available_memory()
    if needed > available:
        raise OutOfResources(
            f"{what} needs {_gigabytes(needed)} of memory, {_gigabytes(available)} are available",
            where=where,
            advice=advice,
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, int]]:
    """Folders of the control groups of this process, from the mount to its own group, with their version.

    In a container, the path that the kernel reports may be outside of the mount; then the mount itself applies.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else 0
        if version:
            mount = root if version == 2 else root / "memory"
            yield mount, version
            parts = Path(path.lstrip("/")).parts
            yield from ((mount.joinpath(*parts[: depth + 1]), version) for depth in range(len(parts)))


def _room(folder: Path, version: int) -> int | None:
    """Available bytes in one group; None without a limit."""
    limit, usage, caches = _FILES[version]
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        used = int((folder / usage).read_text(encoding="utf-8"))
        entries = (line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        statistics = {name: int(value) for name, value in entries}
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + sum(statistics.get(name, 0) for name in caches)


def limit_memory(most: int) -> None:
    """Limit the memory of this process to ``most`` bytes above its current usage, if the system supports it.

    The limit applies to private memory, not to mapped files such as the libraries of runtimes.
    """
    if sys.platform != "linux":
        return
    import resource

    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    most += int(pages[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_share(seconds: float = 0.2) -> float:
    """Share of all processors that is used during ``seconds`` from now on, between 0 and 1."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100


_LIBRARIES = ("numpy", "onnx", "onnx_ir", "onnxscript", "optimum", "torch", "transformers")
"""Those that every build goes through, whatever its targets."""
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Instruction sets by which runtimes select kernels."""


def library_version(name: str) -> str:
    """Version of one installed distribution."""
    return metadata.version(name)


def library_versions(runtimes: Iterable[str]) -> dict[str, str]:
    """Versions of the installed libraries that determine the output, those of ``runtimes`` among them, by name."""
    versions = {}
    for name in sorted({*_LIBRARIES, *runtimes}):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def instruction_set() -> str:
    """Processor architecture of this machine, and its instruction sets among those by which kernels are selected."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    present = set(line.partition(":")[2].split())
    return " ".join([platform.machine(), *(flag for flag in _FLAGS if flag in present)])


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes (0 if the system does not report it)."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
