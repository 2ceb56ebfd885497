"""Reading of untrusted JSON: every kind of defect is one BadInput.

The standard library's parser raises RecursionError for deep nesting, accepts unpaired surrogates that no encoder
accepts later, and reads files of any size. Files of checkpoints, adapters and outputs are therefore read here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from planish.optimizer.errors import BadInput

MAX_BYTES = 256 << 20
"""Maximum length of a parsed text: ten times the largest known tokenizer.json."""
MAX_DEPTH = 64
"""Maximum nesting depth, since walks over the parsed value may recurse."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> Any:
    """The value in a JSON file in UTF-8.

    BadInput if it is not JSON, not UTF-8, larger than ``MAX_BYTES`` or nested deeper than ``MAX_DEPTH``. Errors of the
    file system propagate.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadInput(
            f"this has {size} bytes, and no JSON file that is read here is larger than {MAX_BYTES}", where=path
        )
    return parse_json(path.read_bytes(), path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BadInput for other values, and as in `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise BadInput(f"this holds no JSON object but a {type(value).__name__}", where=path)
    return value


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


def _too_deep(where: object) -> BadInput:
    return BadInput(f"this is nested deeper than {MAX_DEPTH} levels", where=where)
