"""Where passes and backends are found: name -> `module:Class` tables behind entry points.

Each entry of the groups `planish.passes` and `planish.backends` names such a table (a mapping). The built-in tables
come through the same door as everybody else's. A class is imported when somebody asks for it by name, not before.

A distribution of others that is broken stops only those who ask for what it brings: tables list it with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from planish.optimizer.errors import BadInput, OutOfResources, UsageError, in_one_line, of_exception
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
    """A registered name: where its class lives, and which distribution brought it."""

    group: str
    """`planish.passes` or `planish.backends`."""
    name: str
    path: str
    """`module:Class`; of a table that cannot be read, the value of its entry point."""
    distribution: str
    unreadable: str | None = None
    """The reason why the table names no class; None if it does."""

    def load(self) -> Any:
        """The class. For one of others that cannot be used, a class without options that says so where it is listed,
        and raises `fault` for whoever gives it options."""
        if self.fault is None:
            return self._class_and_reason[0]
        if self.distribution == _OWN:  # nothing goes on without ours
            raise self.fault
        return self._stand_in

    @property
    def fault(self) -> UsageError | None:
        """The error for whoever needs the class; None if it can be used. It is imported for that."""
        reason = self._class_and_reason[1]
        if reason is None:
            return None
        return UsageError(
            f"{self.path} cannot be {reason}",
            where=f"distribution {self.distribution}",
            advice=f"mend {self.distribution}, or uninstall it",
        )

    @functools.cached_property
    def _class_and_reason(self) -> tuple[Any, str | None]:
        """The class, or why it cannot be used: `imported (No module named 'x')`."""
        if self.unreadable is not None:
            return None, f"read ({self.unreadable})"
        module, _, name = self.path.partition(":")
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            return None, f"imported ({_told(error)})"
        except (Exception, SystemExit) as error:  # modules of others raise all kinds; of ours, it is a bug
            if self.distribution == _OWN:
                raise
            return None, f"imported ({_told(error)})"
        if not hasattr(loaded, name):
            return None, f"imported ({module} has no {name})"
        cls = getattr(loaded, name)
        # Ours are checked by our tests, which saves every command the time.
        misfit = None if self.distribution == _OWN else _misfit(cls, self.group, self.name)
        return cls, None if misfit is None else f"used ({misfit})"

    @functools.cached_property
    def _stand_in(self) -> type[Any]:
        """A class that tables list in place of one that cannot be used."""
        entry = self
        base = _base_of(self.group)

        @dataclass(frozen=True)
        class Unusable(base):  # type: ignore[valid-type, misc]
            name: ClassVar[str] = entry.name
            distribution: ClassVar[str] = entry.distribution
            model_file: ClassVar[str] = "model"

            @classmethod
            def from_options(cls, options: Mapping[str, Any]) -> Any:
                raise entry.fault or ValueError("it can be used")

            @classmethod
            def missing(cls) -> str:
                return str(entry.fault)

        Unusable.__doc__ = f"Unusable: {self.fault}."
        return Unusable


def _told(error: BaseException) -> str:
    """An exception of a distribution of others, for a message; where memory or files ran out, it is raised again."""
    if isinstance(of_exception(error), OutOfResources):
        raise error
    message = in_one_line(error)
    return message if isinstance(error, ImportError) else f"{type(error).__name__}: {message}"


def _base_of(group: str) -> type[Any]:
    """The class that classes of a group derive from."""
    # Both modules import this one.
    from planish.optimizer.interfaces.backend import Backend
    from planish.optimizer.interfaces.pass_base import Pass

    return Pass if group == PASSES else Backend


def _misfit(cls: Any, group: str, name: str) -> str | None:
    """The first reason why something is not what the table of a group says; None if it is."""
    base = _base_of(group)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"it does not derive from planish.optimizer.{base.__name__}"
    fault = option_text.member_fault(cls) or option_text.options_fault(cls)
    named: Any = cls
    if fault is None and named.name != name:  # it would run under one name, and be looked for under the other
        return f"the table calls it {name!r}, its class {named.name!r}: give both the same name"
    return fault


def _entries_of(group: str, point: metadata.EntryPoint) -> list[Entry]:
    """The entries of one table; of a table that cannot be read, one under the name of its entry point."""
    owner = point.dist.name if point.dist is not None else point.value
    try:
        found = point.load()
        named = dict(found) if isinstance(found, Mapping) else None
    except (Exception, SystemExit) as error:  # a table is a module of others too
        if owner == _OWN:
            raise
        return [Entry(group, point.name, point.value, owner, _told(error))]
    if named is None:
        reason = f"it is a {type(found).__name__}, not a dictionary of names and `module:Class`"
        return [Entry(group, point.name, point.value, owner, reason)]
    return [_entry(group, point, owner, name, path) for name, path in named.items()]


def _entry(group: str, point: metadata.EntryPoint, owner: str, name: object, path: object) -> Entry:
    """One line of a table."""
    if isinstance(name, str) and isinstance(path, str) and all(path.partition(":")):
        return Entry(group, name, path, owner)
    reason = f"it gives {path!r} for {name!r}, not `module:Class`"
    return Entry(group, str(name), point.value, owner, reason)


@functools.cache
def table(group: str) -> Mapping[str, Entry]:
    """All names of one group; a name that two distributions claim is a UsageError that names both."""
    points = sorted(metadata.entry_points(group=group), key=lambda point: (point.name, point.value))
    entries = [entry for point in points for entry in _entries_of(group, point)]
    found: dict[str, Entry] = {}
    for entry in entries:
        other = found.get(entry.name)
        if entry.unreadable is None and other is not None and other.path != entry.path:
            raise UsageError(
                f"{entry.name!r} is registered by {other.distribution} and by {entry.distribution}",
                where=f"entry points {group}",
                advice="uninstall one of the two",
            )
        if entry.unreadable is None:
            found[entry.name] = entry
    for entry in entries:
        if entry.unreadable is not None:  # last, and beside what bears its name: it must take no name from others
            name = f"{entry.distribution}:{entry.name}" if entry.name in found else entry.name
            found[name] = replace(entry, name=name)
    return dict(sorted(found.items()))


def pass_class(name: str) -> type[Pass]:
    """The pass called ``name``; UsageError with the nearest name if there is none, or why it cannot be used."""
    entry = _entry_called(PASSES, name, "pass")
    if entry.fault is not None:
        raise entry.fault
    found: type[Pass] = entry.load()
    return found


def backend_class(name: str) -> type[Backend]:
    """The backend called ``name``; UsageError with the nearest name if there is none.

    For one that cannot be used, a class whose `missing` says so, as where a runtime is missing; it makes no targets.
    """
    found: type[Backend] = _entry_called(BACKENDS, name, "target").load()
    return found


def backend(text: str) -> Backend:
    """A backend with its options, from text: `openvino{threads=2}`."""
    parsed = option_text.parse_one(text, what="target")
    return backend_class(parsed.name).from_options(parsed.options)


def backends() -> Iterator[type[Backend]]:
    """All backends that can be used: those of our own distribution before others, each group by name."""
    for entry in sorted(table(BACKENDS).values(), key=lambda entry: entry.distribution != _OWN):
        if entry.distribution == _OWN or entry.fault is None:
            yield entry.load()


def interpreter() -> Backend:
    """The backend that runs graphs from memory as they are written: the first backend that can."""
    return next(cls for cls in backends() if cls.interprets())()


def libraries() -> list[str]:
    """Distributions of runtimes whose versions decide what engines give."""
    return sorted({library for cls in backends() for library in cls.libraries})


def target_of(path: Path) -> str:
    """The backend that opens a file, by its ending, or an engine folder, by the file it holds."""
    if path.is_dir():
        # In the order of `backends`: a backend of others may write a file of the same name as ours.
        names = [
            cls.name
            for cls in backends()
            if any((path / cls.file_of(part)).is_file() for part in ("model", "decoder_model"))
        ]
    else:
        names = [cls.name for cls in backends() if path.suffix in cls.suffixes and path.is_file()]
    if names:
        return path.name if path.name in names else names[0]
    unusable = "".join(f"; {entry.fault}" for entry in table(BACKENDS).values() if entry.fault is not None)
    endings = " or an ".join(sorted({suffix for cls in backends() for suffix in cls.suffixes}))
    kinds = f"give an output of planish, an engine folder, an {endings} file{unusable}"
    raise BadInput(
        "this holds no engine" if path.exists() else "there is no such file or folder",
        where=path,
        advice="a checkpoint is built first (planish optimize)" if (path / "config.json").is_file() else kinds,
    )


def _entry_called(group: str, name: str, kind: str) -> Entry:
    entries = table(group)
    if name not in entries:
        readable = [known for known, entry in entries.items() if entry.unreadable is None]
        # Tables that cannot be read may be where the name stands.
        faults = [str(entry.fault) for entry in entries.values() if entry.unreadable is not None]
        raise UsageError(
            f"unknown {kind} {name!r}{option_text.did_you_mean(name, readable)}", advice="; ".join(faults) or None
        )
    return entries[name]
