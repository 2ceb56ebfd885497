"""Untrusted lines of text: UTF-8; an error names the line and byte of anything else."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from planish.optimizer.errors import BadInput

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded_lines(lines: Iterable[bytes], where: object) -> Iterator[tuple[int, str]]:
    """Number and text of each non-blank line, without its line end; a byte order mark is removed.

    BadInput for another encoding, with the line and byte that is not UTF-8.
    """
    for number, raw in enumerate(lines, 1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if number == 1 and line.startswith(_UTF16):
            raise BadInput("this is text in UTF-16, not in UTF-8", where=where, advice="save it in UTF-8")
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"byte {error.start + 1} of this line (0x{line[error.start]:02x}) is not UTF-8",
                where=f"{where}, line {number}",
                advice="save the file in UTF-8",
            ) from None
        if text.strip():
            yield number, text
