"""Messages: what libraries say becomes one line, in one way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from planish.optimizer import errors
from planish.optimizer.errors import decode, encode, first_fault, in_one_line, of_exception

ROOT = Path(__file__).parents[2]
ONE_PLACE = {
    "(error).split())[:": "optimizer/errors.py",
    "type(error).__mro__": "optimizer/errors.py",
    'memory ran out"': "optimizer/errors.py",
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


CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PlanishError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_is_plain_data_and_back(kind: type[errors.PlanishError]) -> None:
    error = kind("it \ud800 broke", where=Path("a/b"), advice="mend it", picture="x\n^")
    again = decode(json.loads(json.dumps(encode(error))))
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert vars(decode(encode(kind("it broke")))) == vars(kind("it broke"))


def test_an_error_of_somebody_elses_class_becomes_the_nearest_of_ours() -> None:
    class OfAnotherRuntime(errors.MissingRuntime):
        """What a backend of another distribution may raise."""

    assert type(decode(encode(OfAnotherRuntime("it is not here")))) is errors.MissingRuntime


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.BadInput("it is bad"), "it is bad"),
        (MemoryError(), "memory ran out; close other programs or use a larger machine"),
        (OSError(28, "No space left", "/tmp/x"), "/tmp/x: there is no room to write (No space left); free some space"),
        (ImportError("x.so: Too many open files"), "too many files are open; raise the limit (ulimit -n)"),
        (KeyError("x"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_an_exception_means_for_the_user(error: BaseException, told: str | None) -> None:
    clear = of_exception(error)
    assert clear is None if told is None else str(clear).startswith(told)


@pytest.mark.parametrize(("text", "file"), ONE_PLACE.items())
def test_each_is_written_once(text: str, file: str) -> None:
    sources = [path for folder in ("optimizer", "passes", "backends") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in sources if text in path.read_text(encoding="utf-8")] == [file]
