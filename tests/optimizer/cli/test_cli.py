"""The command line as a contract: help without runtimes, complete tables, one JSON document, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from planish.optimizer.cli import COMMANDS
from planish.optimizer.interfaces import registry
from tests.clocks import all_equal
from tests.conftest import Planish

HEAVY = ("torch", "transformers", "numpy", "onnx", "onnx_ir", "onnxruntime", "openvino", "scipy", "pydantic", "rich")
GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[N, 4] x) => (float[N, 4] r) { y = Identity (x)  z = Relu (y)  r = Add (z, z) }"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    return path


def test_help_comes_without_any_runtime() -> None:
    script = (
        "import sys; from planish.optimizer.cli import cli\n"
        "try: cli.main(['--help'], prog_name='planish')\n"
        f"except SystemExit: print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
    for name, what in COMMANDS.items():
        assert name in done.stdout
        assert what.split()[0] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, command: Planish) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: planish {name}")


@pytest.mark.parametrize("group", ["passes", "backends"])
def test_tables_are_complete(group: str, command: Planish) -> None:
    names = list(registry.table(f"planish.{group}"))
    found = json.loads(command(group, "--json").stdout)
    assert [entry["name"] for entry in found] == names
    assert all(option["help"] for entry in found for option in entry["options"].values())
    markdown = command(group, "--markdown").stdout
    assert all(f"\n| {name} | " in markdown for name in names)


def test_doctor_says_what_would_run(command: Planish) -> None:
    findings = json.loads(command("doctor", "--json").stdout)
    subjects = " ".join(finding["subject"] for finding in findings)
    assert all(name in subjects for name in ("onnxruntime", "openvino", "tensorrt"))
    assert command("doctor").returncode == 0


def test_opt_writes_one_graph(graph: Path, tmp_path: Path, command: Planish) -> None:
    done = command("opt", graph, "--pipeline", "eliminate-identities", "-o", tmp_path / "out.onnx", "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert (report["text"], report["sites"], report["nodes"]) == ("eliminate-identities", 1, [3, 2])
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Relu", "Add"]


def test_opt_prints_graphs_that_changed(graph: Path, tmp_path: Path, command: Planish) -> None:
    pipeline = "fuse-gelu,eliminate-identities"
    out = ["-o", tmp_path / "out.onnx"]
    changed = command("opt", graph, "--pipeline", pipeline, *out, "--print-after-change").stderr
    assert "// after eliminate-identities" in changed
    assert "// after fuse-gelu" not in changed
    before = command("opt", graph, "--pipeline", pipeline, *out, "--print-before").stderr
    assert before.index("// before fuse-gelu") < before.index("// before eliminate-identities")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--pipeline", "eliminate-identites"], 2, "did you mean"),
        (["--pipeline", "eliminate-identities{x=1}"], 2, "x"),
        (["--pipeline", "a,,b"], 2, "^"),
        ([], 2, "give either --pipeline or --preset"),
        (["--preset", "exact", "--pipeline", "fuse-gelu"], 2, "give either --pipeline or --preset"),
        (["--preset", "exakt"], 2, "did you mean"),
        (["--pipeline", "fuse-gelu", "--keep", "cosin>=1"], 2, "did you mean"),
    ],
)
def test_bad_use(arguments: list[str], code: int, message: str, graph: Path, tmp_path: Path, command: Planish) -> None:
    done = command("opt", graph, "-o", tmp_path / "out.onnx", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_an_unknown_command_gets_the_nearest_one(command: Planish) -> None:
    done = command("optimise")
    assert (done.returncode, "did you mean" in done.stderr) == (2, True)


@pytest.mark.slow
def test_optimize_and_bench_as_json(tiny: Path, tmp_path: Path, command: Planish) -> None:
    shape = ["--shape", "batch=1,sequence=8"]
    targets = ["--target", "onnxruntime", "--target", "openvino"]
    done = command("optimize", tiny, "-o", tmp_path / "out", *targets, *shape, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["manifest"]["targets"]) == {"onnxruntime", "openvino"}
    shutil.copy(tmp_path / "out" / "onnxruntime" / "model.onnx", tmp_path / "copy.onnx")
    xml = tmp_path / "out" / "openvino" / "openvino_model.xml"
    done = command("bench", tmp_path / "out", xml, "--against", tmp_path / "copy.onnx", *shape, "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [Path(row["model"]).name for row in rows] == ["copy.onnx", "onnxruntime", "openvino", xml.name]
    assert rows[0]["speedup"] == 1.0
    assert all(row["low"] <= row["speedup"] <= row["high"] for row in rows)


@pytest.mark.slow
def test_bench_opens_an_engine_once_for_each_target_that_is_given(tiny: Path, tmp_path: Path, command: Planish) -> None:
    from planish.optimizer import optimize

    optimize(tiny, tmp_path / "out", preset="exact", clock=all_equal)
    ways = ["--target", "onnxruntime{threads=1}", "--target", "onnxruntime{threads=2}"]
    done = command("bench", tmp_path / "out", *ways, "--shape", "batch=1,sequence=8", "--json", "-")
    labels = [row["model"] for row in json.loads(done.stdout)]
    assert labels == [f"{tmp_path / 'out' / 'onnxruntime'} onnxruntime{{threads={count}}}" for count in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        ["backends"],
        ["opt", "in.onnx", "-o", "out.onnx", "--pipeline", "eliminate-identities"],
        ["explain", "in.onnx", "--pipeline", "eliminate-identities"],
        ["bisect", "in.onnx", "--pipeline", "eliminate-identities"],
        pytest.param(["bench", "in.onnx"], marks=pytest.mark.breadth),
    ],
    ids=lambda words: words[0],
)
def test_commands_run_in_a_process_of_their_own(words: list[str], graph: Path, planish: Planish) -> None:
    """As users run them; other tests do it for the commands that are not listed."""
    done = planish(*words, cwd=graph.parent)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert done.stdout
