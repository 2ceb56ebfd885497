"""The result of a build."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.generation import Decoding


@dataclass(frozen=True)
class Result:
    """A finished output folder."""

    folder: Path
    manifest: Manifest
    measurements: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    """Notes to read after the build: an exact pass that was rolled back, and how to reproduce it."""

    @functools.cached_property
    def engines(self) -> dict[str, Engine]:
        """The engines that this machine can open, by the name of their folder."""
        targets = {name: registry.backend(record.target) for name, record in self.manifest.targets.items()}
        if list(self.manifest.signatures) != ["model"]:
            raise UsageError("these engines have several components", advice="use result.decoding(name)")
        return {n: target.open(self.folder / n) for n, target in targets.items() if target.missing() is None}

    def decoding(self, name: str) -> Decoding:
        """The engine in the folder ``name``, ready to go on with texts token by token."""
        return Decoding.of(
            registry.backend(self.manifest.targets[name].target), self.folder / name, self.manifest.signatures
        )
