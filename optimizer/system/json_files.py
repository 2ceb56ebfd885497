"""Reading of untrusted JSON and TOML: every kind of defect is one BadInput.

The standard library's parsers raise RecursionError for deep nesting and ValueError for integers of thousands of digits,
and read files of any size; that of JSON accepts unpaired surrogates that no encoder accepts later. Files of
checkpoints, adapters, outputs and locks are therefore read here.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput

MAX_BYTES = 256 << 20
"""Maximum length of a parsed file: ten times the largest known tokenizer.json."""
MAX_DEPTH = 64
"""Maximum nesting depth, since walks over the parsed value may recurse."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> Any:
    """The value in a JSON file in UTF-8.

    BadInput if it is not JSON, not UTF-8, larger than ``MAX_BYTES`` or nested deeper than ``MAX_DEPTH``. Errors of the
    file system propagate.
    """
    return parse_json(_bytes_of(path, "JSON"), path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BadInput for other values, and as in `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise BadInput(f"this holds no JSON object but a {type(value).__name__}", where=path)
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; BadInput and errors of the file system as in `read_json`."""
    content = _bytes_of(path, "TOML")
    try:
        tables = tomllib.loads(content.decode())
    except RecursionError:
        raise _too_deep(path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"this is not TOML ({error})", where=path) from error
    except ValueError as error:  # the limit of Python on the digits of an integer, which tomllib does not convert
        raise BadInput("this holds an integer that is too long", where=path) from error
    check_value(tables, path)
    return tables


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text; ``where`` is its location in BadInput."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # also UnicodeDecodeError
        raise BadInput(f"this is not JSON ({error})", where=where) from error
    check_value(value, where)
    return value


def check_value(value: object, where: object) -> None:
    """Raise BadInput for deep nesting and for strings that are not Unicode, without recursion; ``where`` is the
    location."""
    level = [value]
    for _ in range(MAX_DEPTH):
        strings = [part for part in level if isinstance(part, str)]
        strings += [key for part in level if isinstance(part, dict) for key in part]
        broken = next(filter(_SURROGATE.search, strings), None)
        if broken is not None:
            raise BadInput(f"this is not Unicode text: {broken!r} has half of a surrogate pair", where=where)
        level = [
            inner
            for part in level
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return
    raise _too_deep(where)


def _bytes_of(path: Path, kind: str) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadInput(
            f"this has {size} bytes, and no {kind} file that is read here is larger than {MAX_BYTES}", where=path
        )
    return path.read_bytes()


def _too_deep(where: object) -> BadInput:
    return BadInput(f"this is nested deeper than {MAX_DEPTH} levels", where=where)
