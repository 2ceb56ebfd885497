"""Tables on terminals of any width and in pipes, completion in shells, and what the catalogue tells of one pass."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from planish.optimizer.cli import cli
from planish.optimizer.cli.catalogue import entry_called, told
from planish.optimizer.cli.display import drawn, plain, print_table
from planish.optimizer.fidelity.metrics import METRICS
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.components.tasks import TASKS
from planish.optimizer.pipeline import presets
from tests.conftest import Planish
from tests.optimizer.cli.test_bad_input import BAD_INPUT, USAGE, refused

ROOT = Path(__file__).parents[3]
COLUMNS = ("target", "shipped", "size", "fidelity", "budget", "speed-up over plain", "median ms")
ROWS = [
    (
        "openvino{buckets=[1x16]}",
        "optimized: faster than the plain lowering",
        "22.9 MB",
        "last_hidden_state: max_abs 4.47e-08 cosine 1\nnext: kl 0.1",
        "cosine>=0.99",
        "1.22x [1.19, 1.34] at batch=1,sequence=128\n1.30x [1.29, 1.31] at batch=4,sequence=16",
        "0.10 (0.13 plain)",
    ),
    ("", "tried pack-projections,quantize-weights{bits=4 block=128},quantize-weights: not kept", *[""] * 5),
]


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120, 160, 200])
def test_a_drawn_table_fits_and_breaks_no_word(width: int) -> None:
    text = drawn("a title", COLUMNS, ROWS, width)
    assert max(map(len, text.splitlines())) <= width
    words = [word for row in (COLUMNS[1:], *ROWS) for cell in row for word in cell.split() if len(word) <= 20]
    for word in words:
        assert re.search(rf"(^|\s){re.escape(word)}(\s|$)", text, re.MULTILINE), word


@pytest.mark.parametrize("width", [60, 120])
def test_a_drawn_table_may_be_empty(width: int) -> None:
    assert drawn("a title", COLUMNS, [], width).startswith("a title")


def test_a_piped_table_is_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("a title", COLUMNS, ROWS)
    printed = capsys.readouterr().out
    assert printed.strip() == plain("a title", COLUMNS, ROWS)
    title, head, *rows = printed.splitlines()
    assert title == "a title"
    assert printed.isascii()
    assert [re.split(r"  +", line) for line in (head, *rows)] == [
        list(COLUMNS),
        [cell.replace("\n", "; ") for cell in ROWS[0]],
        [cell or "-" for cell in ROWS[1]],
    ]


@pytest.mark.parametrize("group", ["passes", "backends"])
def test_lists_are_plain_when_piped(group: str, command: Planish) -> None:
    listed = command(group).stdout
    assert "─" not in listed
    names = registry.table(registry.PASSES if group == "passes" else registry.BACKENDS)
    assert [line.split()[0] for line in listed.splitlines()] == [group, "name", *names]


def test_one_pass_is_told_whole(command: Planish) -> None:
    told = command("passes", "quantize-weights").stdout
    assert told.startswith("quantize-weights (from planish; not exact: checked against --keep)")
    assert "Before:" in told
    assert "After:" in told
    assert re.search(r"^  bits=8 \(.*\)$", told, re.MULTILINE)
    for name in registry.table(registry.PASSES):
        entry = json.loads(command("passes", name, "--json").stdout)
        assert entry["name"] == name
        assert "Before" in entry["module"] or entry["from"] != "planish" or "before" in entry["module"].lower()
    refused(USAGE, "unknown pass 'quantise-weights' (did you mean", "passes", "quantise-weights")
    refused(USAGE, "a single pass is told as text", "passes", "fuse-gelu", "--markdown")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_what_is_told_of_a_pass_fits(width: int, command: Planish, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in registry.table(registry.PASSES):
        entry = entry_called(registry.PASSES, name)
        text = told(entry, width)
        assert max(map(len, text.splitlines())) <= width, name
        assert not re.search(r" $", text, re.MULTILINE), name
        written = [entry["module"], entry["rules"], *(option["help"] for option in entry["options"].values())]
        said = "".join(text.split())
        assert all("".join(part.split()) in said for part in written), name
    monkeypatch.setenv("COLUMNS", str(width))
    assert command("passes", name).stdout == f"{text}\n"


def test_pictures_and_rules_keep_their_form_on_a_narrow_terminal() -> None:
    text = told(entry_called(registry.PASSES, "fold-constants"), 60)
    assert re.search(r"^Before:  a = Constant .*\n {9}\S", text, re.MULTILINE)
    assert re.search(r"^2\. A larger result .*\n {3}\S.*\n3\. `*Constant`* nodes", text, re.MULTILINE)


def completed(*words: str) -> set[str]:
    """What a shell offers for the last of the words."""
    *arguments, incomplete = words
    completion = ShellComplete(cli, {}, "planish", "_PLANISH_COMPLETE")
    return {item.value for item in completion.get_completions(arguments, incomplete)}


def test_shells_complete_names() -> None:
    passes, targets = set(registry.table(registry.PASSES)), set(registry.table(registry.BACKENDS))
    assert completed("opt") >= {"opt", "optimize"}
    assert completed("optimize", "model", "--target", "") == targets
    assert completed("optimize", "model", "--preset", "") == set(presets.PRESETS)
    assert completed("optimize", "model", "--task", "fill") == {task for task in TASKS if task.startswith("fill")}
    assert completed("optimize", "model", "--keep", "cos") == {"cosine>=", "cosine_min>="}
    assert {name.rstrip("<>=") for name in completed("bisect", "model", "--keep", "")} == set(METRICS)
    assert completed("explain", "model", "--pass", "fuse-g") == {"fuse-gelu"}
    assert completed("passes", "") == passes
    assert completed("opt", "m", "--pipeline", "fold-constants,fuse-g") == {"fold-constants,fuse-gelu"}
    assert completed("opt", "m", "--expect", "fuse-att") == {"fuse-attention="}


def test_the_script_for_a_shell_comes_from_the_command_itself(planish: Planish) -> None:
    import os

    done = planish(env={**os.environ, "_PLANISH_COMPLETE": "zsh_source"})
    assert done.returncode == 0, done.stderr
    assert "compdef" in done.stdout


@pytest.mark.parametrize("name", ["bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_hub_id_is_answered_with_how_to_fetch_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"hf download {name} --local-dir {name.rpartition('/')[2]}"
    refused(BAD_INPUT, f"fetch it with `{command}` and give that folder", "optimize", name, "-o", "out")
    (tmp_path / "checkpoint").mkdir()
    refused(BAD_INPUT, command, "optimize", "checkpoint", "-o", "out", "--adapter", name)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", ["below/none", "model.onnx", "/none/of/it", "../none"])
def test_a_path_is_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.optimizer.errors import BadInput

    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    with pytest.raises(BadInput) as caught:
        lower(name)
    assert "hf download" not in str(caught.value)


def test_the_demo_ends_with_what_to_do_next() -> None:
    told = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    said = subprocess.run(
        ["sh"], input="\n".join(re.findall(r"^echo.*$", told, re.MULTILINE)), capture_output=True, text=True
    )
    assert f'export PATH="{ROOT / ".venv" / "bin"}:$PATH"' in said.stdout
    assert "planish run build/demo/fast --text" in said.stdout


def test_the_help_of_optimize_has_every_option_under_one_heading(command: Planish) -> None:
    from planish.optimizer.cli.optimize_command import command as optimize

    told = command("optimize", "--help").stdout
    for parameter in optimize.params:
        for name in parameter.opts[-1:] if parameter.name != "source" else ():
            assert len(re.findall(rf"^ +(-\w, )?{name}(\s|$)", told, re.MULTILINE)) == 1, name
    headings = re.findall(r"^(\S.*):$", told, re.MULTILINE)
    assert headings == [*type(optimize).sections, "Other options"]
