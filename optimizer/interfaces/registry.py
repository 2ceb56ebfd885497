"""Where passes and backends are found: name -> `module:Class` tables behind entry points.

Each entry of the groups `planish.passes` and `planish.backends` names such a table (a mapping). The built-in tables
come through the same door as everybody else's. A class is imported when somebody asks for it by name, not before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.optimizer.errors import BadInput, UsageError, in_one_line
from planish.optimizer.interfaces import option_text

if TYPE_CHECKING:
    from planish.optimizer.interfaces.backend import Backend
    from planish.optimizer.interfaces.pass_base import Pass

PASSES = "planish.passes"
BACKENDS = "planish.backends"
DEFAULT_TARGET = "onnxruntime"
"""The target where none is named."""
_OWN = "planish"
"""The distribution that this package is part of."""


@dataclass(frozen=True)
class Entry:
    """A registered class: where it lives, and which distribution brought it."""

    path: str
    """`module:Class`."""
    distribution: str

    def load(self) -> Any:
        """Import the module and return the class; UsageError names the distribution if that fails."""
        module, _, name = self.path.partition(":")
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            raise self._broken(in_one_line(error)) from error
        if not hasattr(loaded, name):
            raise self._broken(f"{module} has no {name}")
        return getattr(loaded, name)

    def _broken(self, reason: str) -> UsageError:
        """A distribution of others must not look like a bug of ours: every build reads the table of backends."""
        return UsageError(
            f"{self.path} cannot be imported ({reason})",
            where=f"distribution {self.distribution}",
            advice=f"mend {self.distribution}, or uninstall it",
        )


@functools.cache
def table(group: str) -> Mapping[str, Entry]:
    """All names of one group; a name that two distributions claim is a UsageError that names both."""
    found: dict[str, Entry] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
        owner = point.dist.name if point.dist is not None else point.value
        for name, path in point.load().items():
            if name in found and found[name].path != path:
                raise UsageError(
                    f"{name!r} is registered by {found[name].distribution} and by {owner}",
                    where=f"entry points {group}",
                    advice="uninstall one of the two",
                )
            found[name] = Entry(path, owner)
    return dict(sorted(found.items()))


def pass_class(name: str) -> type[Pass]:
    """The pass called ``name``; UsageError with the nearest name if there is none."""
    found: type[Pass] = _load(PASSES, name, "pass")
    return found


def backend_class(name: str) -> type[Backend]:
    """The backend called ``name``; UsageError with the nearest name if there is none."""
    found: type[Backend] = _load(BACKENDS, name, "target")
    return found


def backend(text: str) -> Backend:
    """A backend with its options, from text: `openvino{threads=2}`."""
    parsed = option_text.parse_one(text, what="target")
    return backend_class(parsed.name).from_options(parsed.options)


def backends() -> Iterator[type[Backend]]:
    """All backends: those of our own distribution before others, each group by name."""
    names = table(BACKENDS)
    yield from map(backend_class, sorted(names, key=lambda name: names[name].distribution != _OWN))


def interpreter() -> Backend:
    """The backend that runs graphs from memory as they are written: the first backend that can."""
    return next(cls for cls in backends() if cls.interprets())()


def libraries() -> list[str]:
    """Distributions of runtimes whose versions decide what engines give."""
    return sorted({library for cls in backends() for library in cls.libraries})


def target_of(path: Path) -> str:
    """The backend that opens a file, by its ending, or an engine folder, by the file it holds."""
    if path.is_dir():
        names = [
            name
            for name in table(BACKENDS)
            if any((path / backend_class(name).file_of(part)).is_file() for part in ("model", "decoder_model"))
        ]
    else:
        names = [cls.name for cls in backends() if path.suffix in cls.suffixes and path.is_file()]
    if names:
        return path.name if path.name in names else names[0]
    endings = " or an ".join(sorted({suffix for cls in backends() for suffix in cls.suffixes}))
    kinds = f"give an output of planish, an engine folder, an {endings} file"
    raise BadInput(
        "this holds no engine" if path.exists() else "there is no such file or folder",
        where=path,
        advice="a checkpoint is built first (planish optimize)" if (path / "config.json").is_file() else kinds,
    )


def _load(group: str, name: str, kind: str) -> Any:
    entries = table(group)
    if name not in entries:
        raise UsageError(f"unknown {kind} {name!r}{option_text.did_you_mean(name, entries)}")
    return entries[name].load()
