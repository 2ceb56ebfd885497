"""Natural sentences that every Python brings along: its own language reference."""

from __future__ import annotations

import re
from itertools import islice

_MARKUP = re.compile(r"[|*`_<>\[\]{}=\\]|::|\.\.\s")
_FEWEST_WORDS, _MOST_WORDS = 8, 40


def sentences(count: int = 160) -> list[str]:
    """``count`` different sentences of 8 to 40 words, spread over all topics; the same for the same Python."""
    from pydoc_data.topics import topics

    found = dict.fromkeys(s for name in sorted(topics) for s in _sentences_of(topics[name]))
    step = max(1, len(found) // count)
    return list(islice(found, 0, None, step))[:count]


def _sentences_of(text: str) -> list[str]:
    """The plain sentences of the paragraphs of a topic; code and lists are indented, headings have no full stop."""
    blocks = [block for block in re.split(r"\n\s*\n", text) if not block.startswith((" ", "\t"))]
    flat = [" ".join(block.split()) for block in blocks]
    parts = [part for block in flat for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", block)]
    return [part for part in parts if _is_plain(part)]


def _is_plain(part: str) -> bool:
    words = len(part.split())
    return (
        _FEWEST_WORDS <= words <= _MOST_WORDS and part[0].isupper() and part[-1] in ".!?" and not _MARKUP.search(part)
    )
