"""Lines of text that somebody else wrote: UTF-8, and anything else is said with its line and byte."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from planish.optimizer.errors import BadInput

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded_lines(lines: Iterable[bytes], where: object) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank, without its end; a mark of UTF-8 at the beginning is dropped.

    BadInput if it is text in another encoding: it names the line, and the byte in it, that is not UTF-8.
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
