"""The documentation is true: every command and script shown is run, every link leads somewhere, tables are current."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Planish
from tests.train import MODELS
from tests.zoo import IMAGES, build

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"command-line", "quantization"}
"""Pages whose commands take minutes."""
FOLLOWED = "extending"
"""The page whose scripts are files that belong together: `tests/test_extending.py` writes and runs them."""
GENERATED = re.compile(r"<!-- planish (passes|backends) --markdown -->\n(.*?)<!-- end -->", re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def commands(page: Path) -> Iterator[tuple[str, int]]:
    """Each command of a page with the exit code it is said to have."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command, _, remark = line.partition("  # ")
            said = re.search(r"exit code (\d+)", remark)
            if command.strip():
                yield command.strip(), int(said.group(1)) if said else 0


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A working folder with what the pages speak of."""
    shutil.copytree(tiny, tmp_path / "checkpoint")
    shutil.copytree(MODELS / "writer", tmp_path / "writer")
    build(next(species for species in IMAGES if species.model_type == "vit"), tmp_path / "vit")
    np.savez(tmp_path / "images.npz", pixel_values=np.zeros((2, 3, 30, 24), np.float32))
    (tmp_path / "texts.txt").write_text("w1 w2\nw3 w4 w5\nw6\n")
    (tmp_path / "score.py").write_text("print('looking'); print(0.5)\n")
    return tmp_path


def run_every_day(page: Path) -> object:
    """The pages with commands; what takes minutes is left to `make breadth`."""
    return pytest.param(page, marks=pytest.mark.breadth if page.stem in LONG else pytest.mark.slow, id=page.stem)


SHELL = re.compile(r"[|<>&;$*`]")
"""What only a shell understands."""


@pytest.mark.parametrize("page", [run_every_day(page) for page in PAGES if blocks(page, "sh")])
def test_every_command_shown_is_run(page: Path, place: Path, command: Planish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line, code in commands(page):
        program, *rest = shlex.split(line)
        if program == "make":  # what it does is what is running now: see only that there is such a goal
            done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        elif SHELL.search(line):
            done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
        else:
            assert program == "planish", f"no way to check: {line}"
            done = command(*rest)
        assert done.returncode == code, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "script"),
    [
        pytest.param(page, script, marks=pytest.mark.breadth if page.stem in LONG else (), id=page.stem)
        for page in PAGES
        if page.stem != FOLLOWED
        for script in blocks(page, "python")
    ],
)
def test_every_script_shown_is_run(page: Path, script: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("script.py").write_text(script)
    runpy.run_path("script.py", run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_tables_of_passes_and_targets_are_current(command: Planish, request: pytest.FixtureRequest) -> None:
    page = ROOT / "docs" / "passes.md"
    tables = {name: f"\n{command(name, '--markdown').stdout.strip()}\n\n" for name in ("passes", "backends")}
    tables["backends"] = without_last_column(tables["backends"])  # what runs on this machine is not for a page
    if request.config.getoption("--update-golden"):
        page.write_text(
            GENERATED.sub(lambda m: f"<!-- planish {m[1]} --markdown -->\n{tables[m[1]]}<!-- end -->", page.read_text())
        )
        pytest.skip("rewritten: look at the difference")
    assert dict(GENERATED.findall(page.read_text())) == tables


def without_last_column(table: str) -> str:
    return "\n".join(line and line.rstrip("| ").rpartition(" | ")[0] + " |" for line in table.split("\n"))


_SPEED = "avx512-bf16/speed"
"""The table of speed that README quotes: the newest one."""


def test_figures_of_the_readme_are_those_that_benchmarks_wrote() -> None:
    folder = ROOT / "benchmarks" / "results"
    results = {f"{path.parent.name}/{path.stem}": path.read_text() for path in folder.glob("*/*.md")}
    text = (ROOT / "README.md").read_text()
    said = " ".join(text.split())

    def measured(table: str, start: str) -> list[str]:
        (row,) = [line for line in results[table].splitlines() if line.startswith(f"| {start} |")]
        return [cell.strip() for cell in row.strip("|").split("|")]

    rows = [line for line in text.splitlines() if re.match(r"\| (onnxruntime|optimum|torch|NNCF|planish)", line)]
    assert len(rows) == 8
    for row in rows:
        engine, *figures = [cell.strip() for cell in row.strip("|").split("|")]
        export, _, plain, _ = measured(_SPEED, f"minilm | {engine}")[3:]
        assert [export, plain, *measured("avx512-bf16/fidelity", f"minilm | {engine}")[-2:]] == figures
    whole = re.search(r"shape is made ([\d.]+) \(ONNX Runtime\) and ([\d.]+) \(OpenVINO\) times as fast", said)
    static = re.search(r"NNCF's file, MiniLM is ([^;]+?) and BERT-base ([^;]+?) times as fast;", said)
    without = re.search(r"without data BERT-base is ([^;]+?) times as fast as the plain file", said)
    exact = re.search(r"makes MiniLM ([\d.]+) and ([\d.]+) times as fast", said)
    prompt = re.search(
        r"prompt of 128 tokens ([^(]+) \(ONNX Runtime\) and ([^(]+) \(OpenVINO\) times as fast\. In", said
    )
    written = re.search(r"writes ([^(]+) \(ONNX Runtime\) and ([^(]+) \(OpenVINO\) times as many tokens", said)
    assert whole and exact and prompt and written and static and without
    for place, name in enumerate(("minilm", "bert-base"), start=1):
        assert measured(_SPEED, f"{name} | planish fast on openvino")[-1] == static[place]
    assert measured(_SPEED, "bert-base | planish fast, no data on openvino")[-2] == without[1]
    for place, target in enumerate(("onnxruntime", "openvino"), start=1):
        assert measured(_SPEED, f"bert-base | planish fast on {target}")[3].startswith(f"{whole[place]} [")
        assert measured("amx/exact", f"minilm encoder | 1 x 128 | {target}")[5].startswith(f"{exact[place]} [")
        *_, read, wrote = measured("amx/decode-qwen2-0.5b", f"planish small on {target}")
        assert (read, wrote) == (prompt[place], written[place])


def test_every_result_of_a_benchmark_is_in_the_table_of_results() -> None:
    folder = ROOT / "benchmarks" / "results"
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in [*folder.glob("*/*.md"), *folder.glob("*/*.svg")]:
        assert f"(../benchmarks/results/{path.relative_to(folder).as_posix()})" in page


def test_versions_of_peers_are_those_that_the_benchmarks_install() -> None:
    pinned = "".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "benchmarks").glob("*.py")])
    told = re.findall(r"\((\S+) ([\d.]+)\) \|", (ROOT / "docs" / "benchmarks.md").read_text())
    assert len(told) == 6
    for name, version in told:
        assert f"{name}=={version}" in pinned


def test_every_decision_has_a_number_of_its_own() -> None:
    numbers = [int(page.name[:4]) for page in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
