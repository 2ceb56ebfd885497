"""Examination of this machine: libraries, processor, GPU, targets."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

import psutil
from packaging.requirements import Requirement

from planish.optimizer.interfaces import registry
from planish.optimizer.lowering.torch_device import cuda_device
from planish.optimizer.system.machine import cores, instruction_set


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    state: str
    """`ok`, `missing` or `attention`."""
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """All facts that determine which targets run on this machine."""
    return [_python(), *_libraries(), _processor(), _memory(), _gpu(), *_targets()]


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _libraries() -> list[Finding]:
    """Each declared dependency with its installed version."""
    findings = []
    for text in metadata.requires("planish") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            findings.append(
                Finding(requirement.name, "missing", f"wanted {requirement.specifier}", f"pip install '{requirement}'")
            )
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        advice = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        findings.append(
            Finding(
                requirement.name, "ok" if fits else "attention", f"{version} (wanted {requirement.specifier})", advice
            )
        )
    return findings


def _processor() -> Finding:
    flags = instruction_set()
    int8 = any(flag in flags for flag in ("vnni", "amx_int8", "asimddp", "i8mm"))
    advice = (
        "" if int8 else "int8 engines may be no faster here, and u8 x s8 products can saturate: trust the measurement"
    )
    return Finding("processor", "ok" if int8 else "attention", f"{cores()} cores, {flags}", advice)


def _memory() -> Finding:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    return Finding(
        "memory and disk",
        "ok",
        f"{memory.available / 2**30:.1f} GiB of memory and {disk.free / 2**30:.1f} GiB of disk are free",
    )


def _gpu() -> Finding:
    name = cuda_device()
    if name is not None:
        return Finding("GPU", "ok", name)
    device = shutil.which("nvidia-smi")
    detail = (
        "no NVIDIA driver is installed"
        if device is None
        else "a driver is installed, this build of torch does not use it"
    )
    return Finding("GPU", "missing", detail, "needed only to run TensorRT engines and CUDA providers")


def _targets() -> list[Finding]:
    findings = []
    for name in registry.table(registry.BACKENDS):
        cls = registry.backend_class(name)
        missing = cls.missing()
        detail = f"{cls.distribution} {_version(cls.distribution)}" if missing is None else missing
        findings.append(
            Finding(
                f"target {name}",
                "ok" if missing is None else "missing",
                detail,
                "" if missing is None else "engines can be emitted, not run",
            )
        )
    return findings


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(version unknown)"
