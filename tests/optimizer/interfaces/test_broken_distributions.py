"""Broken passes and backends of other distributions stop only those who ask for them by name."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
import pytest

import planish.optimizer
from planish.optimizer import Pipeline
from planish.optimizer.errors import BadInput, OutOfResources, UsageError
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.rewrite_pass import RewritePass
from tests.conftest import Planish

Install = Callable[..., str]
counter = itertools.count()

TARGET = """
from dataclasses import dataclass
from typing import ClassVar
from planish.optimizer import Backend
@dataclass(frozen=True)
class Yours(Backend):
    '''A runtime.'''
    name: ClassVar[str] = "yours"
    distribution: ClassVar[str] = "onnx"
    model_file: ClassVar[str] = "model.yours"
    def emit(self, program, folder): ...
    def open(self, path): ...
    @classmethod
    def missing(cls): return None
"""
PASS = """
from dataclasses import dataclass
from typing import ClassVar
from planish.optimizer.interfaces.rewrite_pass import RewritePass
@dataclass(frozen=True)
class Yours(RewritePass):
    '''A fusion.'''
    name: ClassVar[str] = "yours"
    root: ClassVar[str] = "Abs"
    since: ClassVar[int] = 1
    level: int = 0
    '''How much.'''
    def pattern(self, node): return node
    def check(self, match): ...
    def rewrite(self, match): return match.outputs[0], []
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution with one module beside its table; returns the name of its package."""

    def installed(module: str, table: str = "{'yours': f'{__name__}.yours:Yours'}", group: str = "backends") -> str:
        package, site = f"foreign_{next(counter)}", tmp_path / "site"
        facts = site / f"{package}-1.0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[planish.{group}]\nfrom-there = {package}:TABLE\n")
        (site / package).mkdir()
        (site / package / "__init__.py").write_text(f"TABLE = {table}\n" if table else "")
        (site / package / "yours.py").write_text(module)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", str(site))
        registry.table.cache_clear()
        return package

    yield installed
    monkeypatch.undo()
    registry.table.cache_clear()


CLASSES = {
    "a name that is not defined": (f"{TARGET}\nundefined", "imported (NameError: name 'undefined' is not defined)"),
    "syntax": ("class Yours(:", "imported (SyntaxError: invalid syntax (yours.py, line 1))"),
    "an import": ("import no_such_module", "imported (No module named 'no_such_module')"),
    "an exit": ("raise SystemExit(3)", "imported (SystemExit: 3)"),
    "another class": ("class Mine: ...", ".yours has no Yours)"),
    "no backend": ("class Yours: ...", "used (it does not derive from planish.optimizer.Backend)"),
    "no class": ("Yours = 3", "used (it does not derive from planish.optimizer.Backend)"),
    "another name": (
        TARGET.replace('"yours"', '"mine"'),
        "used (the table calls it 'yours', its class 'mine': give both",
    ),
    "an abstract class": (TARGET.replace("def open", "def opened"), "used (Yours does not define open)"),
    "no file": (TARGET.replace("    model_file", "    file"), "used (Yours.model_file is missing: write"),
    "libraries as text": (
        TARGET.replace("    def emit", "    libraries = 'onnx'\n    def emit"),
        "used (Yours.libraries is 'onnx': input should be a valid tuple)",
    ),
    "no dataclass": (TARGET.replace("@dataclass(frozen=True)", ""), "used (Yours is not a frozen dataclass: write"),
    "not frozen": (
        TARGET.replace("frozen=True", ""),
        "TypeError: cannot inherit non-frozen dataclass from a frozen one",
    ),
    "an option without a docstring": (
        TARGET.replace("    def emit", "    level: int = 0\n    def emit"),
        "used (option level has no docstring beneath it)",
    ),
    "an option without a default": (
        TARGET.replace("    def emit", "    level: int\n    '''How much.'''\n    def emit"),
        "used (option level has no default: write",
    ),
    "an option of an unknown type": (
        TARGET.replace("    def emit", "    level: 'Level' = 0\n    def emit"),
        "used (the types of the options of Yours cannot be read (",
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_backend_that_cannot_be_used_is_listed_with_the_reason(case: str, install: Install, command: Planish) -> None:
    module, reason = CLASSES[case]
    package = install(module)
    with pytest.raises(UsageError) as caught:
        registry.backend("yours{level=1}")
    told = str(caught.value)
    assert told.startswith(f"distribution {package}: {package}.yours:Yours cannot be ")
    assert reason in told
    assert told.endswith(f"; mend {package}, or uninstall it")
    assert "yours" not in [cls.name for cls in registry.backends()]
    (row,) = [row for row in json.loads(command("backends", "--json").stdout) if row["name"] == "yours"]
    assert (row["missing"], row["summary"], row["from"]) == (told, f"Unusable: {told}.", package)


TABLES = {
    "a list": ("['yours']", "it is a list, not a dictionary of names and `module:Class`"),
    "no table": ("", "has no attribute 'TABLE'"),
    "an error": ("undefined", "NameError: name 'undefined' is not defined"),
    "an import": ("__import__('no_such_module')", "No module named 'no_such_module'"),
    "a number for a class": ("{'yours': 3}", "it gives 3 for 'yours', not `module:Class`"),
    "a number for a name": ("{3: 'a:B'}", "it gives 'a:B' for 3, not `module:Class`"),
    "no class in a module": ("{'yours': 'module'}", "it gives 'module' for 'yours', not `module:Class`"),
    "a name of ours": ("{'onnxruntime': None}", "it gives None for 'onnxruntime', not `module:Class`"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_cannot_be_read_is_listed_with_the_reason(case: str, install: Install, command: Planish) -> None:
    table, reason = TABLES[case]
    package = install("", table)
    (row,) = [row for row in json.loads(command("backends", "--json").stdout) if row["from"] == package]
    assert row["missing"].startswith(f"distribution {package}: {package}:TABLE cannot be read (")
    assert reason in row["missing"]
    for name in ("no-such-target", row["name"]):
        with pytest.raises(UsageError) as caught:
            registry.backend(name)
        assert row["missing"] in str(caught.value)
    assert str(registry.backend("onnxruntime")) == "onnxruntime"


@pytest.mark.slow
def test_a_build_that_does_not_need_it_goes_on(install: Install, tmp_path: Path, planish: Planish) -> None:
    install("undefined")
    onnx.save(graph(), tmp_path / "m.onnx")
    done = planish("optimize", tmp_path / "m.onnx", "-o", tmp_path / "out", "--pipeline", "fold-constants")
    assert (done.returncode, "yours" in done.stdout + done.stderr) == (0, False), done.stderr


def test_commands_that_do_not_need_it_go_on(install: Install, tmp_path: Path, command: Planish) -> None:
    package = install("undefined")
    onnx.save(graph(), tmp_path / "m.onnx")
    assert command("doctor").returncode == 0
    (finding,) = [f for f in json.loads(command("doctor", "--json").stdout) if f["subject"] == "target yours"]
    assert package in finding["detail"]
    done = command("optimize", tmp_path / "m.onnx", "-o", tmp_path / "other", "--target", "yours", "--preset", "exact")
    assert done.returncode == UsageError.exit_code
    assert done.stderr.count("\n") == 1
    assert f"planish: error: distribution {package}: {package}.yours:Yours cannot be imported (NameError" in done.stderr
    (tmp_path / "m.yours").touch()
    with pytest.raises(BadInput, match=rf"an \.xml file; distribution {package}: .* cannot be imported"):
        registry.target_of(tmp_path / "m.yours")


PASSES = {
    "syntax": ("class Yours(:", "imported (SyntaxError: invalid syntax (yours.py, line 1))"),
    "no root": (
        PASS.replace("    root:", "    rot:"),
        "used (Yours.root is missing: write `root: ClassVar[...] = ...`",
    ),
    "no opset": (PASS.replace("    since:", "    sins:"), "used (Yours.since is missing: write"),
    "an opset as text": (
        PASS.replace("[int] = 1", "[str] = '1'"),
        "Yours.since is '1': input should be a valid integer",
    ),
    "no rewrite": (PASS.replace("def rewrite", "def write"), "used (Yours does not define rewrite)"),
    "another name": (PASS.replace('"yours"', '"yuors"'), "used (the table calls it 'yours', its class 'yuors'"),
    "not frozen": (PASS.replace("frozen=True", ""), "TypeError: cannot inherit non-frozen dataclass from a frozen one"),
    "no docstring": (PASS.replace("    '''How much.'''\n", ""), "used (option level has no docstring beneath it)"),
    "a backend": (TARGET, "used (it does not derive from planish.optimizer.Pass)"),
}


@pytest.mark.parametrize("case", PASSES)
def test_a_pass_that_cannot_be_used_is_listed_with_the_reason(case: str, install: Install, command: Planish) -> None:
    module, reason = PASSES[case]
    package = install(module, group="passes")
    assert str(Pipeline.parse("fold-constants")) == "fold-constants"
    (row,) = [row for row in json.loads(command("passes", "--json").stdout) if row["name"] == "yours"]
    assert row["summary"].startswith(f"Unusable: distribution {package}: {package}.yours:Yours cannot be ")
    assert reason in row["summary"]
    for arguments in (("passes", "yours"), ("opt", "none.onnx", "-o", "none", "--pipeline", "yours")):
        done = command(*arguments)
        assert done.returncode in (UsageError.exit_code, BadInput.exit_code)
        assert "Traceback" not in done.stderr
    with pytest.raises(UsageError, match=f"distribution {package}: "):
        Pipeline.parse("yours{level=1}")


def test_a_rewrite_without_nodes_is_told_to_its_author(install: Install, tmp_path: Path, command: Planish) -> None:
    package = install(PASS, group="passes")
    onnx.save(graph(), tmp_path / "m.onnx")
    done = command("opt", tmp_path / "m.onnx", "-o", tmp_path / "out.onnx", "--pipeline", "yours")
    assert done.returncode == UsageError.exit_code
    assert f"pass yours ({package}.yours:Yours): rewrite() returns (" in done.stderr
    assert ", []), not (output of a node that is replaced, [new node, ...]); " in done.stderr


@dataclass(frozen=True)
class Returning(RewritePass[ir.Node]):
    """Returns what it is told to."""

    name: ClassVar[str] = "returning"
    root: ClassVar[str] = "Abs"
    since: ClassVar[int] = 1
    returned: ClassVar[Callable[[ir.Node], object]]

    def pattern(self, node: ir.Node) -> ir.Node:
        return node

    def check(self, match: ir.Node) -> None: ...

    def rewrite(self, match: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
        return type(self).returned(match)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "returned",
    [
        lambda node: None,
        lambda node: (node.outputs[0], [None]),
        lambda node: (node.inputs[0], [ir.node("Neg", node.inputs)]),
        lambda node: (node, [ir.node("Neg", node.inputs)]),
        lambda node: node.outputs[0],
    ],
)
def test_a_rewrite_that_replaces_nothing_is_refused(
    returned: Callable[[ir.Node], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Returning, "returned", staticmethod(returned), raising=False)
    with pytest.raises(UsageError, match=r"pass returning \(.*:Returning\): rewrite\(\) returns "):
        Returning()(ir.from_proto(graph()))


def test_a_distribution_is_not_blamed_where_files_run_out(install: Install) -> None:
    package = install("raise OSError(24, 'Too many open files')")
    with pytest.raises(OSError, match="Too many open files"):
        registry.backend("yours")
    (entry,) = [entry for entry in registry.table(registry.BACKENDS).values() if entry.distribution == package]
    assert OutOfResources.exit_code != UsageError.exit_code
    assert entry.unreadable is None


def test_docstrings_are_not_asked_for_where_there_is_no_source() -> None:
    names: dict[str, object] = {"__name__": __name__}
    exec(textwrap.dedent(PASS).replace("'''How much.'''", ""), names)
    assert option_text.options_fault(names["Yours"]) is None  # type: ignore[arg-type]


def test_the_public_names_are_listed() -> None:
    assert {*planish.optimizer.__all__, "__version__"} <= set(dir(planish.optimizer))


def graph() -> onnx.ModelProto:
    """A magnitude of x."""
    return onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[N, 4] x) => (float[N, 4] r) { r = Abs (x) }'
    )
