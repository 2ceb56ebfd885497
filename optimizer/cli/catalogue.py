"""The tables of passes and of targets: read off the classes, so that they cannot be out of date."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from planish.optimizer import registry, spec
from planish.optimizer.cli.display import print_table


def entries(group: str) -> list[dict[str, Any]]:
    """Name, summary, options and origin of everything registered in a group."""
    return [_entry(name, entry) for name, entry in registry.table(group).items()]


def _entry(name: str, entry: registry.Entry) -> dict[str, Any]:
    cls = entry.load()
    found = {
        "name": name,
        "summary": (cls.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " "),
        "options": {option: _option(facts) for option, facts in spec.schema(cls).items()},
        "from": entry.distribution,
    }
    if hasattr(cls, "missing"):
        found["missing"] = cls.missing()
    return found


def _option(facts: Mapping[str, Any]) -> dict[str, Any]:
    bounds = {
        key: facts[key]
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum")
        if key in facts
    }
    return {
        "type": facts.get("type", "choice"),
        "default": facts.get("default"),
        "help": " ".join(facts.get("description", "").split()),
        **bounds,
    }


def entry_called(group: str, name: str) -> dict[str, Any]:
    """One entry, with its whole documentation; UsageError with the nearest name if there is none."""
    cls = registry.pass_class(name) if group == registry.PASSES else registry.backend_class(name)
    module = (sys.modules[cls.__module__].__doc__ or "").strip()
    return {
        **_entry(name, registry.table(group)[name]),
        "exact": getattr(cls, "exact", None),
        "module": module,
        "rules": inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[2],
    }


def print_entry(entry: Mapping[str, Any]) -> None:
    """What a pass does, before and after, its rules and its options."""
    exactness = "exact: held against rounding" if entry["exact"] else "not exact: held against --keep"
    print(f"{entry['name']} (from {entry['from']}; {exactness})\n\n{entry['module']}")
    if entry["rules"]:
        print(f"\n{entry['rules']}")
    print("\noptions" if entry["options"] else "\nno options")
    for name, option in entry["options"].items():
        bounds = {key: value for key, value in option.items() if key not in ("type", "default", "help")}
        limits = "".join(f", {key} {spec.format_value(value)}" for key, value in bounds.items())
        print(f"  {name}={spec.format_value(option['default'])} ({option['type']}{limits})")
        print(textwrap.fill(option["help"], 100, initial_indent="      ", subsequent_indent="      "))


def print_catalogue(title: str, found: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    """Print entries as a table."""
    runnable = any("missing" in entry for entry in found)
    rows = []
    for entry in found:
        options = "\n".join(
            f"{name}={spec.format_value(o['default'])}" + (f": {o['help']}" if markdown else "")
            for name, o in entry["options"].items()
        )
        rows.append(
            (
                entry["name"],
                entry["summary"],
                options,
                entry["from"],
                *([entry["missing"] or "runs here"] if runnable else []),
            )
        )
    columns = ("name", "what it does", "options", "from", *(["on this machine"] if runnable else []))
    print_table(title, columns, rows, markdown=markdown)
