"""The rules of the house: layers, registration, docstrings, golden tests, sizes. See CONTRIBUTING.md."""

from __future__ import annotations

import ast
import functools
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planish.backends import BACKENDS
from planish.optimizer import Backend, Pass
from planish.optimizer.interfaces import option_text, registry
from planish.passes import PASSES

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("optimizer", "passes", "backends") for path in sorted((ROOT / folder).rglob("*.py"))]
PASS_FILES = [path for path in SOURCES if path.parts[-3] == "passes" and not path.name.startswith("_")]
TESTED = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring not counted: explaining must not cost."""
    text = ast.get_docstring(function, clean=False)
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    return lines if text is None else lines - text.count("\n") - 1


def test_the_layers_hold() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_every_room_has_a_place_in_the_contract_and_tests_of_its_name() -> None:
    """The contract is exhaustive, so that `lint-imports` refuses a room that it does not name."""
    assert "exhaustive = true" in (ROOT / "pyproject.toml").read_text()
    rooms = {path.parent.name for path in (ROOT / "optimizer").glob("*/__init__.py")}
    tested = {path.parent.name for path in (ROOT / "tests" / "optimizer").glob("*/__init__.py")}
    assert tested == rooms


def test_every_pass_file_is_registered_under_its_own_name() -> None:
    by_file = {relative(path): path.stem.replace("_", "-") for path in PASS_FILES}
    registered = {
        entry.partition(":")[0].removeprefix("planish.").replace(".", "/") + ".py": n for n, entry in PASSES.items()
    }
    assert by_file == registered
    assert set(PASSES) <= set(registry.table(registry.PASSES))


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_documented_frozen_dataclass(name: str) -> None:
    cls: Any = registry.table(registry.PASSES)[name].load()
    module = sys.modules[cls.__module__].__doc__ or ""
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert cls.__dataclass_params__.frozen
    assert re.search(r"^Before:  \S.*^After:   \S", module, re.DOTALL | re.MULTILINE), "show the IR before and after"
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "say what the pass does"
    for option, facts in option_text.schema(cls).items():
        assert facts.get("description"), f"document {option}"
        assert "default" in facts, f"{option} needs a default: a pass can be named without options"


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_golden_cases(name: str) -> None:
    text = (ROOT / "tests" / "data" / "passes" / f"{name}.test").read_text()
    assert text.count("[case ") >= 3
    refuses = (
        "Refusal"
        in (ROOT / PASSES[name].partition(":")[0].removeprefix("planish.").replace(".", "/"))
        .with_suffix(".py")
        .read_text()
    )
    assert not refuses or "[refused]" in text, "a refusal that no case shows may never happen"


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_have_the_same_members(name: str) -> None:
    cls = registry.table(registry.BACKENDS)[name].load()
    assert issubclass(cls, Backend)
    assert cls.name == name
    for member in ("emit", "open", "missing"):
        assert callable(getattr(cls, member))
    for option, facts in option_text.schema(cls).items():
        assert facts.get("description"), f"document {option}"
    assert (ROOT / "tests" / "backends" / f"test_{name}.py").is_file()


MODELS = {"torch", "transformers", "optimum", "peft", "accelerate"}
IMPORT_MODELS = ("optimizer/lowering/", "optimizer/inference/")
"""Rooms that import PyTorch and what builds upon it."""
ALSO_IMPORT_MODELS = {"backends/tensorrt/target.py"}
"""It asks for a GPU, and may import no room that does."""


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """First part of the name of each module that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def test_heavy_runtimes_are_imported_inside_functions() -> None:
    heavy = {*MODELS, "onnxruntime", "openvino", "tensorrt", "tokenizers", "scipy"}
    for path in SOURCES:
        found = heavy & set(imported(outside_functions(tree_of(path))))
        assert not found, f"{relative(path)} imports {found}"


def test_only_lowering_and_inference_import_pytorch() -> None:
    importing = {relative(path) for path in SOURCES if MODELS & set(imported(ast.walk(tree_of(path))))}
    assert any(path.startswith(IMPORT_MODELS[0]) for path in importing), "the test finds nothing"
    assert {path for path in importing if not path.startswith(IMPORT_MODELS)} == ALSO_IMPORT_MODELS


def test_importing_the_package_imports_no_library() -> None:
    """Nor does looking at one of its names before it is used."""
    script = (
        "import sys; before = set(sys.modules); import planish.optimizer; dir(planish.optimizer); "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['planish']"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, which many tests read."""
    return ast.parse(path.read_text())


def test_files_are_short() -> None:
    for path in TESTED:
        limit = 300 if path in PASS_FILES else 500 if "benchmarks" in path.parts else 400
        assert len(path.read_text().splitlines()) <= limit, relative(path)


def test_functions_are_short() -> None:
    lengths = {f"{relative(path)}:{f.lineno} {f.name}": length(f) for path in SOURCES for f in functions(path)}
    assert {where: lines for where, lines in lengths.items() if lines > 60} == {}
    deciles = statistics.quantiles(lengths.values(), n=10)
    assert deciles[4] <= 12
    assert deciles[8] <= 35


def test_nothing_is_unfinished_and_no_exception_is_swallowed() -> None:
    marks = re.compile(r"\bTODO\b|\bFIXME\b|\bXXX\b|except[^\n]*:\s*\n\s*(pass|\.\.\.)\b")
    for path in SOURCES:
        found = marks.search(path.read_text())
        assert found is None, f"{relative(path)}: {found.group() if found else ''}"


def test_error_classes_carry_the_documented_exit_codes() -> None:
    from planish.optimizer import errors

    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.PlanishError)]
    codes = {cls.__name__: cls.exit_code for cls in classes}
    assert set(codes.values()) == {1, 2, 3, 4, 5, 70}, codes


def comment_density(folder: str) -> float:
    """Comment lines per 100 lines of code in a package, without directives of linters and without docstrings."""
    directive = re.compile(r"#\s*(noqa|type:|fmt:|mypy:|ruff:)")
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    comments = code = 0
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        written: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += directive.match(token.string) is None
            elif token.type not in layout:
                written.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and docstring(node) is not None:
                written -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        code += len(written)
    return 100 * comments / code


def docstring(node: ast.AST) -> str | None:
    """The text of a docstring of a module, class, function or attribute; None for other statements."""
    value = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
    return value if isinstance(value, str) else None


@pytest.mark.parametrize("package", ["optimizer", "passes", "backends"])
def test_comments_say_why_in_two_of_a_hundred_lines(package: str) -> None:
    assert comment_density(package) >= 2


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    for path in SOURCES:
        vague = re.compile(r"(What|Whether|Why|Let" + (r"|How)\b" if path.parent.name == "interfaces" else r")\b"))
        for node in ast.walk(tree_of(path)):
            assert not vague.match((docstring(node) or "").strip()), f"{relative(path)}: {docstring(node)}"


def test_public_classes_have_names_of_their_own() -> None:
    names = Counter(
        node.name
        for path in SOURCES
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == set()


def test_functions_have_few_parameters() -> None:
    many = set()
    for path in SOURCES:
        for function in functions(path):
            arguments = function.args
            names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} - {"self", "cls"}
            if len(names) > 8:
                many.add(f"{relative(path)} {function.name}")
    assert many == set()
