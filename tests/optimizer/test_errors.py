"""Messages: what libraries say becomes one line, in one way."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from planish.optimizer.errors import first_fault, in_one_line

ROOT = Path(__file__).parents[2]
ONE_PLACE = {
    "(error).split())[:": "optimizer/errors.py",
    ".errors()[0]": "optimizer/errors.py",
    "Tokenizers that know no limit": "optimizer/runtime/tokenization.py",
}
"""Text that stands in one file alone: others call what it does."""


class Entry(BaseModel):
    sizes: dict[str, list[int]]


def test_what_a_library_says_is_one_short_line() -> None:
    assert in_one_line(RuntimeError("it broke\n  at\tline 3\n")) == "it broke at line 3"
    assert len(in_one_line(RuntimeError("word " * 10_000))) == 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"sizes": {"batch": [1, "x"]}}, "sizes.batch.1: Input should be a valid integer"),
        ({}, "sizes: Field required"),
        ([], "the file: Input should be a valid dictionary"),
        ({"sizes": {5: []}}, "sizes.5: Input should be a valid string"),
    ],
)
def test_the_first_fault_of_a_file_is_told_with_its_place(content: object, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Entry.model_validate(content)
    assert first_fault(caught.value).startswith(said)


@pytest.mark.parametrize(("text", "file"), ONE_PLACE.items())
def test_each_is_written_once(text: str, file: str) -> None:
    sources = [path for folder in ("optimizer", "passes", "backends") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in sources if text in path.read_text(encoding="utf-8")] == [file]
