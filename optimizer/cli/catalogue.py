"""The tables of passes and of targets: read off the classes, so that they cannot be out of date."""

from __future__ import annotations

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


def print_catalogue(title: str, found: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    """Print entries as a table."""
    runnable = any("missing" in entry for entry in found)
    rows = []
    for entry in found:
        options = "\n".join(
            f"{name}={spec.format_value(o['default'])}: {o['help']}" for name, o in entry["options"].items()
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
