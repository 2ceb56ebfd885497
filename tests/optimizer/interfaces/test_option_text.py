"""The text of pipelines and targets, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.optimizer.errors import UsageError
from planish.optimizer.interfaces import option_text

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(WORDS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
OPTIONS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@pytest.mark.slow
@given(st.lists(st.tuples(NAMES, st.dictionaries(OPTIONS, VALUES, max_size=3)), max_size=3))
def test_what_is_written_is_read_back(specs: list[tuple[str, dict[str, option_text.Value]]]) -> None:
    text = ",".join(option_text.format_spec(name, options) for name, options in specs)
    assert [(found.name, dict(found.options)) for found in option_text.parse(text)] == specs


def test_blanks_may_stand_anywhere_and_a_bare_option_is_true() -> None:
    (first, second) = option_text.parse("  a { x = 1  y=[ b , c ] } , b{flag} , ")
    assert (first.name, dict(first.options)) == ("a", {"x": "1", "y": ["b", "c"]})
    assert (second.name, dict(second.options)) == ("b", {"flag": "true"})


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("a,,b", "expected a name, found ','", 2),
        ("a b", "expected ',' between two names, found 'b'", 2),
        ("a{x=}", "expected a value, found '}'", 4),
        ("a{x=1", "expected an option or '}', found the end", 5),
        ("a{x=1 x=2}", "option 'x' is given twice", 6),
        ("a{x=[1 2]}", "expected ',' or ']', found '2'", 7),
        ("a{x=$}", "unexpected character '$'", 4),
        ('a{x="\\q"}', "escape that JSON does not know", 4),
    ],
)
def test_errors_point_at_their_place(text: str, message: str, column: int) -> None:
    with pytest.raises(UsageError) as caught:
        option_text.parse(text)
    assert message in caught.value.what
    assert f"column {column + 1} of the pipeline" in caught.value.what
    assert caught.value.picture == f"{text}\n{' ' * column}^"


def test_did_you_mean_names_the_nearest_or_everything() -> None:
    assert option_text.did_you_mean("exat", ["exact", "fast"]) == " (did you mean 'exact'?)"
    assert option_text.did_you_mean("zzz", ["exact", "fast"]) == " (there are: exact, fast)"
    assert option_text.did_you_mean("zzz", []) == " (there are none)"
