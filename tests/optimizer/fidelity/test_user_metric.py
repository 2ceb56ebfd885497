"""The user's own measure: a command that prints a number, and all the ways in which it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, CheckFailed, UsageError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.metrics import Comparison
from planish.optimizer.fidelity.user_metric import Evaluation, scored
from tests.clocks import all_faster
from tests.conftest import Planish


def python(code: str) -> str:
    return f'{sys.executable} -c "{code}"'


def test_the_last_line_is_the_score_and_the_folder_is_given(tmp_path: Path) -> None:
    shown = python("import sys; print('loading', sys.argv[1]); print(0.25)")
    assert Evaluation.parse(shown).score(tmp_path) == 0.25
    placed = Evaluation.parse(python("import sys; print(len(sys.argv[1]))") + " x{}y z")
    assert placed.score(Path("abc")) == 5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (python("print('good')"), "the last line is no number but 'good'"),
        (python("print('nan')"), "the last line is no number but 'nan'"),
        (python("pass"), "the last line is no number but ''"),
        (python("raise SystemExit('no such data')"), "the command failed with 1: no such data"),
        ("/nowhere/score", "the command cannot be run"),
    ],
)
def test_what_is_no_score_is_one_line(command: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        Evaluation.parse(command).score(tmp_path)


@pytest.mark.parametrize("command", ["", "python 'open"])
def test_what_is_no_command_is_usage(command: str) -> None:
    with pytest.raises(UsageError):
        Evaluation.parse(command)


def test_budgets_of_a_score() -> None:
    budget = Budget.parse(["score>=0.9", "score>=0.99x"])
    assert str(budget) == "score>=0.9 score>=0.99x"
    assert Budget.parse(str(budget).split()) == budget
    assert not budget.violations(Comparison({"engine": scored(0.95, 0.955)}))
    assert len(budget.violations(Comparison({"engine": scored(0.89, 0.95)}))) == 2
    assert Budget.parse(["score<=3"]).violations(Comparison({"engine": scored(4.0, None)}))


@pytest.mark.slow
def test_an_engine_that_scores_too_low_is_not_shipped(
    tiny: Path, tmp_path: Path, command: Planish, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "import pathlib, sys\nplace = pathlib.Path(sys.argv[1])\nassert (place / 'config.json').is_file()\n"
        "print(2 if b'_int8' in b''.join(f.read_bytes() for f in place.glob('*.onnx')) else 1)\n"
    )
    options: Any = {"pipeline": "quantize-int8{minimum=1}", "evaluate": f"{sys.executable} {script}"}
    kept = optimize(tiny, tmp_path / "kept", keep=["score>=2x"], **options, clock=all_faster)
    found = kept.manifest.targets["onnxruntime"].comparison
    assert found["own measure.engine"] == {"score": 2, "score_ratio": 2}
    with pytest.raises(CheckFailed, match="score_ratio of engine is 2, the budget asks score<=1x"):
        optimize(tiny, tmp_path / "refused", keep=["score<=1x"], **options, clock=all_faster)
    assert not (tmp_path / "refused").exists()
    assert "its own measure was not taken again" in command("verify", tmp_path / "kept").stdout
    with pytest.raises(UsageError, match="are not judged"):
        optimize(tiny, tmp_path / "refused", reference="none", **options, clock=all_faster)
    usage = command("optimize", tiny, "-o", tmp_path / "no", "--keep", "score>=1")
    assert usage.returncode == 2
    assert "give --evaluate" in usage.stderr
