"""Broken and hostile JSON: one BadInput, whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.optimizer.errors import BadInput, CheckFailed, printable
from planish.optimizer.system.json_files import parse_json, read_json, read_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "this is not JSON"),
        (b"\xff\xfe{\x00", "this is not JSON"),
        (b"[" * 100_000, "nested deeper than"),
        (b"[" * 900 + b"]" * 900, "nested deeper than"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"1" * 5000, "this is not JSON"),
    ],
)
def test_broken_texts(text: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        parse_json(text, "config.json")
    assert str(caught.value).startswith("config.json: ")


def test_values_come_as_they_are() -> None:
    assert parse_json('{"a": [1, {"b": null}], "c": Infinity}', "here") == {"a": [1, {"b": None}], "c": float("inf")}
    assert parse_json('"\\ud83d\\ude00"', "here") == "😀"


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(BadInput, match="holds no JSON object but a list"):
        read_object(path)


def test_messages_are_short_and_have_no_control_characters() -> None:
    error = CheckFailed("a\x1b[31mred\x07\x00" + "x" * 10_000_000, where="\ud800file", advice="mend\nit")
    assert len(str(error)) < 10_000
    assert str(error).startswith("\\ud800file: a\\x1b[31mred\\x07\\x00x")
    assert str(error).endswith("; mend it")
    assert printable("two\nlines of naïve text 日本") == "two\nlines of naïve text 日本"
