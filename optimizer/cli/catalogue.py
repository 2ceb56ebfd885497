"""The tables of passes and of targets. They are read from the classes, so that they are always current."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from planish.optimizer.cli.display import print_table
from planish.optimizer.interfaces import option_text, registry


def entries(group: str) -> list[dict[str, Any]]:
    """Name, summary, options and origin of everything registered in a group."""
    return [_entry(name, entry) for name, entry in registry.table(group).items()]


def _entry(name: str, entry: registry.Entry) -> dict[str, Any]:
    cls = entry.load()
    row = {
        "name": name,
        "summary": (cls.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " "),
        "options": {option: _option(facts) for option, facts in option_text.schema(cls).items()},
        "from": entry.distribution,
    }
    if hasattr(cls, "missing"):
        row["missing"] = cls.missing()
    return row


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
    """Print the description of a pass, its rules and its options, as wide as the terminal."""
    print(told(entry, shutil.get_terminal_size((_WIDEST, 24)).columns))


def told(entry: Mapping[str, Any], width: int) -> str:
    """The same as text whose lines fit ``width`` characters."""
    exactness = "exact: checked against the noise floor" if entry["exact"] else "not exact: checked against --keep"
    parts = [f"{entry['name']} (from {entry['from']}; {exactness})", *entry["module"].split("\n\n")]
    parts += entry["rules"].split("\n\n") if entry["rules"] else []
    text = "\n\n".join(_paragraph(part, width) for part in parts)
    lines = [text, "", "options" if entry["options"] else "no options"]
    for name, option in entry["options"].items():
        bounds = {key: value for key, value in option.items() if key not in ("type", "default", "help")}
        limits = "".join(f", {key} {option_text.format_value(value)}" for key, value in bounds.items())
        shown = f"{name}={option_text.format_value(option['default'])} ({option['type']}{limits})"
        lines += _filled(shown, width, "  ", "      ")
        lines += _filled(option["help"], min(width, _WIDEST_HELP), "      ", "      ")
    return "\n".join(lines)


_WIDEST, _WIDEST_HELP = 120, 100
"""Columns where there is no terminal, and of the options' help on any."""
_PICTURE = re.compile(r"^\s|\S {2,}\S", re.MULTILINE)
"""Lines that stand below each other on purpose: graphs before and after."""
_LABEL = re.compile(r"(Before: +|After: +|\d+\. | *)")


def _paragraph(text: str, width: int) -> str:
    """A paragraph unchanged if it fits. Otherwise prose and list items are refilled; lines of a diagram are folded one
    by one, with a hanging indent."""
    lines = text.splitlines()
    if max(map(len, lines), default=0) <= width:
        return text
    if re.match(r"\d+\. ", text):
        lines = [" ".join(item.split()) for item in re.split(r"\n(?=\d+\. )", text)]
    elif not _PICTURE.search(text):
        lines = [" ".join(text.split())]
    return "\n".join(part for line in lines for part in _filled(line, width, "", " " * _hang(line)))


def _hang(line: str) -> int:
    label = _LABEL.match(line)
    return 0 if label is None else label.end()


def _filled(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def print_catalogue(title: str, listed: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    """Print entries as a table."""
    runnable = any("missing" in entry for entry in listed)
    rows = []
    for entry in listed:
        options = "\n".join(
            f"{name}={option_text.format_value(o['default'])}" + (f": {o['help']}" if markdown else "")
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
