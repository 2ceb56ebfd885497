"""Text form of a name with options: `name{option=value other=[a,b]}`, alone or in a list.

Grammar (blanks are allowed between any two tokens)::

    specs   = [ spec { "," spec } [ "," ] ]
    spec    = NAME [ "{" { option } "}" ]
    option  = NAME [ "=" value ]                 a bare option means true
    value   = WORD | STRING | "[" [ value { "," value } ] "]"

NAME and WORD are runs of letters, digits and `_ . + : / -`; STRING is a JSON string. Values are texts here: the
dataclass of the options converts them to its types (`build`).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from planish.optimizer.errors import UsageError, first_fault, in_one_line

T = TypeVar("T")

Value: TypeAlias = "str | list[Value]"
"""An option's text, or a list of them."""

_WORD = re.compile(r"[A-Za-z0-9_.+:/\-]+")
_TOKEN = re.compile(r'\s*(?:(?P<word>[A-Za-z0-9_.+:/\-]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}=,\[\]]))')


@dataclass(frozen=True)
class Spec:
    """A name, the texts of its options, and the column of the name in the source text (0-based)."""

    name: str
    options: Mapping[str, Value]
    column: int = 0


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def parse(text: str, *, what: str = "pipeline") -> list[Spec]:
    """Read a list of specs; UsageError shows the text with a caret at the error."""
    return _Parser(text, what).specs()


def parse_one(text: str, *, what: str) -> Spec:
    """Read exactly one spec."""
    found = parse(text, what=what)
    if len(found) != 1:
        raise UsageError(f"expected one {what}, found {len(found)} in {text!r}", advice="write name{option=value}")
    return found[0]


def format_spec(name: str, options: Mapping[str, object]) -> str:
    """The text from which `parse` reads the same name and options."""
    inner = " ".join(f"{key}={format_value(value)}" for key, value in options.items())
    return f"{name}{{{inner}}}" if inner else name


def format_value(value: object) -> str:
    """The text of one option value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    text = repr(value) if isinstance(value, int | float) else str(value)
    return text if _WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def format_dataclass(name: str, owner: Any) -> str:
    """The text of a dataclass of options, without options that have their default."""
    changed = {
        option.name: value
        for option in dataclasses.fields(owner)
        if (value := getattr(owner, option.name)) != option.default
    }
    return format_spec(name, changed)


def point_at(text: str, column: int) -> str:
    """Two lines: the text, and a caret under ``column``."""
    return f"{text}\n{' ' * column}^"


def build(cls: type[T], options: Mapping[str, Any], *, owner: str) -> T:
    """Create a dataclass from option texts; UsageError with each invalid option and the accepted values."""
    from pydantic import ValidationError

    try:
        built: T = _adapter(cls).validate_python(dict(options))
    except ValidationError as error:
        raise UsageError("; ".join(_explain(cls, fault) for fault in error.errors()), where=owner) from None
    return built


def schema(cls: type[Any]) -> dict[str, Any]:
    """JSON schema of the fields of a dataclass of options: type, bounds, default, documentation.

    Documentation of an inherited field is taken from the base class.
    """
    found = dict(_adapter(cls).json_schema().get("properties", {}))
    for base in [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) and found]:
        for name, facts in _adapter(base).json_schema().get("properties", {}).items():
            found[name] = facts | found[name]
    return found


def member_fault(cls: type[Any]) -> str | None:
    """The first fault of what a pass or a backend must define beside its options: abstract methods, and the class
    members that its base declares, each with a value of its type. None if there is no fault."""
    from pydantic import TypeAdapter, ValidationError

    if inspect.isabstract(cls):
        return f"{cls.__name__} does not define {', '.join(sorted(cls.__abstractmethods__))}"
    for member, annotation in _declared_members(cls).items():
        if not hasattr(cls, member):
            return f"{cls.__name__}.{member} is missing: write `{member}: ClassVar[...] = ...` in the class"
        try:
            # Strict: text would otherwise do for a number, and a dictionary for a recipe.
            TypeAdapter(annotation).validate_python(getattr(cls, member), strict=True)
        except ValidationError as error:
            told = first_fault(error).removeprefix("the file: ")
            return f"{cls.__name__}.{member} is {reprlib.repr(getattr(cls, member))}: {told[0].lower()}{told[1:]}"
    return None


def _declared_members(cls: type[Any]) -> dict[str, Any]:
    """Class members that bases of ours declare, and their types. Names in annotations of others may not resolve."""
    members: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is not cls and base.__module__.startswith(__package__):
            hints = get_type_hints(base, include_extras=True).items()
            members |= {
                name: get_args(hint)[0]
                for name, hint in hints
                if get_origin(hint) is ClassVar and not name.startswith("__")
            }
    return members


def options_fault(cls: type[Any]) -> str | None:
    """The first fault of a dataclass of options: not frozen, or an option without a docstring or a default. None if
    there is no fault."""
    parameters = vars(cls).get("__dataclass_params__")  # of the class itself: those of its base say nothing
    if parameters is None or not parameters.frozen:
        return f"{cls.__name__} is not a frozen dataclass: write @dataclass(frozen=True) above the class"
    try:
        options = schema(cls)
    except Exception as error:  # noqa: BLE001 - annotations of others are evaluated here, and raise all kinds
        return (
            f"the types of the options of {cls.__name__} cannot be read ({type(error).__name__}: {in_one_line(error)})"
        )
    for option, facts in options.items():
        if not facts.get("description") and _has_source(cls):
            return f"option {option} has no docstring beneath it"
        if "default" not in facts:
            return f"option {option} has no default: write `= value` behind its type"
    return None


def _has_source(cls: type[Any]) -> bool:
    """True if docstrings of attributes can be read: they are in the source, which a distribution may lack."""
    try:
        inspect.getsource(cls)
    except (OSError, TypeError):
        return False
    return True


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or the list of names, for the end of an error message."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (there are: {', '.join(names)})" if names else " (there are none)"


_ADAPTERS: dict[type[Any], Any] = {}


def _adapter(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    # Building a TypeAdapter takes milliseconds, and a pipeline text is parsed often.
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _explain(cls: type[Any], fault: Mapping[str, Any]) -> str:
    option = str(fault["loc"][0]) if fault["loc"] else "?"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown option {option!r}{did_you_mean(option, [f.name for f in dataclasses.fields(cls)])}"
    return f"option {option}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


class _Parser:
    """Recursive descent parser of the grammar above, one method per rule."""

    def __init__(self, text: str, what: str) -> None:
        self.text = text
        self.what = what
        self.tokens = self._tokens()
        self.position = 0

    def specs(self) -> list[Spec]:
        found: list[Spec] = []
        while self._peek().kind != "end":
            found.append(self._spec())
            if self._peek().kind != "end":
                self._take(",", "',' between two names")
        return found

    def _spec(self) -> Spec:
        name = self._take("word", "a name")
        options: dict[str, Value] = {}
        if self._accept("{"):
            while not self._accept("}"):
                self._option(options)
        return Spec(name.text, options, name.column)

    def _option(self, options: dict[str, Value]) -> None:
        key = self._take("word", "an option or '}'")
        # Options are written as on the command line; fields are Python names.
        name = key.text.replace("-", "_")
        if name in options:
            raise self._error(f"option {key.text!r} is given twice", key)
        options[name] = self._value() if self._accept("=") else "true"

    def _value(self) -> Value:
        token = self._peek()
        if self._accept("["):
            return self._items()
        self.position += token.kind in ("word", "string")
        if token.kind == "string":
            return self._string(token)
        if token.kind != "word":
            raise self._error("expected a value", token)
        return token.text

    def _items(self) -> list[Value]:
        items: list[Value] = []
        while not self._accept("]"):
            items.append(self._value())
            if self._peek().kind != "]":
                self._take(",", "',' or ']'")
        return items

    def _string(self, token: _Token) -> str:
        try:
            return str(json.loads(token.text))
        except json.JSONDecodeError:
            raise self._error("this string has an escape that JSON does not know", token) from None

    def _tokens(self) -> Sequence[_Token]:
        found: list[_Token] = []
        column = 0
        text = self.text.rstrip()
        while column < len(text):
            match = _TOKEN.match(text, column)
            if match is None:
                # The token pattern skips blanks; the caret must point behind them.
                column += len(text[column:]) - len(text[column:].lstrip())
                raise self._error(f"unexpected character {text[column]!r}", _Token("?", text[column], column))
            kind = match.lastgroup or ""
            token = match.group(kind)
            found.append(_Token(token if kind == "mark" else kind, token, match.start(kind)))
            column = match.end()
        return [*found, _Token("end", "", len(text))]

    def _peek(self) -> _Token:
        return self.tokens[self.position]

    def _accept(self, kind: str) -> bool:
        taken = self._peek().kind == kind
        self.position += taken
        return taken

    def _take(self, kind: str, expected: str) -> _Token:
        token = self._peek()
        if not self._accept(kind):
            raise self._error(f"expected {expected}", token)
        return token

    def _error(self, message: str, token: _Token) -> UsageError:
        found = repr(token.text) if token.text else "the end"
        message = f"{message}, found {found}" if message.startswith("expected") else message
        return UsageError(
            f"{message} at column {token.column + 1} of the {self.what}", picture=point_at(self.text, token.column)
        )


OPTIONS_CONFIG: dict[str, Any] = {
    "arbitrary_types_allowed": True,
    "extra": "forbid",
    "use_attribute_docstrings": True,
}
"""Configuration of pydantic for fields of passes and backends: the docstring under a field documents the option."""
