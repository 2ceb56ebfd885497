"""Engine folders: a target's files, and the files of the source that loaders expect beside them."""

from __future__ import annotations

import filecmp
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from planish.optimizer.compilation.job import Job
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.ir import onnx_io


def emit(job: Job, target: Backend, models: Mapping[str, ir.Model], place: Path) -> None:
    """Write an engine of these graphs into a new folder ``place``, with the companions of the source."""
    place.mkdir(parents=True)
    target.emit(replace(job.program, components=dict(models)), place)
    if job.lowered.folder is None:
        return
    for name in job.lowered.companions:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if name in job.lowered.rewritten:
            (place / name).write_text(job.lowered.rewritten[name], encoding="utf-8")
        else:
            onnx_io.copy_file(job.lowered.folder / name, place / name)


def replace_folder(source: Path, place: Path) -> None:
    """Replace the folder ``place`` by a copy of ``source``."""
    shutil.rmtree(place)
    shutil.copytree(source, place)


def same_files(one: Path, other: Path) -> bool:
    """True if two folders hold the same files, byte for byte."""
    names = [{path.relative_to(place) for path in place.rglob("*") if path.is_file()} for place in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


@dataclass(frozen=True)
class PlainEngine:
    """The engine of the plain lowering for one target: no pass of ours, all optimizations of the runtime.

    It is emitted, and scored by the user's own metric, when that is first needed.
    """

    job: Job
    arithmetics: tuple[Backend, ...]
    """The target in the arithmetic of this engine, and behind it those of candidates that leave the budget in it."""

    @property
    def target(self) -> Backend:
        """The target in the arithmetic of this engine."""
        return self.arithmetics[0]

    @functools.cached_property
    def place(self) -> Path:
        """Its folder."""
        # How many arithmetics are left tells the plain engines of a target apart.
        place = self.job.places.scratch / f"plain-{self.target.name}-{len(self.arithmetics)}"
        emit(self.job, self.target, {name: model.clone() for name, model in self.job.program.components.items()}, place)
        return place

    @functools.cached_property
    def score(self) -> float:
        """The user's own metric of it; ValueError if there is none."""
        if self.job.request.evaluation is None:
            raise ValueError("no metric of the user's own was asked for")
        return self.job.request.evaluation.score(self.place)
