"""Passes and backends of another distribution; and a wrong pass among them, caught, named, undone and reproduced."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer import Pipeline, optimize
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.testing import check_backend
from tests.clocks import all_equal
from tests.conftest import Planish

SOURCE = Path(__file__).parents[2] / "third_party"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, built and installed into a folder of its own."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    subprocess.run(["cp", "-r", f"{SOURCE}/.", source], check=True)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(source)], check=True)
    return site


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The distribution, importable in this process and in those that it starts."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    registry.table.cache_clear()
    yield site
    registry.table.cache_clear()


@pytest.mark.slow
def test_its_passes_and_backends_are_found_by_name(installed: Path, planish: Planish) -> None:
    assert str(Pipeline.parse("negate-twice{pairs=2},fold-constants")) == "negate-twice{pairs=2},fold-constants"
    assert str(registry.backend("evaluator{verbose=1}")) == "evaluator{verbose=1}"
    listed = json.loads(planish("passes", "--json").stdout)
    assert {"negate-twice": "planish-example", "fold-constants": "planish"}.items() <= {
        entry["name"]: entry["from"] for entry in listed
    }.items()


def test_without_it_its_names_are_unknown() -> None:
    with pytest.raises(UsageError, match="unknown pass 'negate-twice'"):
        Pipeline.parse("negate-twice")


def test_a_name_that_two_distributions_claim_is_an_error(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = __import__("planish_example")
    monkeypatch.setitem(example.PASSES, "fold-constants", "planish_example.passes:NegateTwice")
    registry.table.cache_clear()
    with pytest.raises(UsageError, match="'fold-constants' is registered by planish-example and by planish"):
        Pipeline.parse("fold-constants")


def test_its_backend_passes_the_checks_that_authors_run(installed: Path) -> None:
    skipped = check_backend(registry.backend_class("evaluator"))
    assert skipped == {"missing-runtime": "planish itself needs onnx: it is always there"}


@pytest.mark.slow
def test_its_backend_gives_a_checked_and_measured_engine(installed: Path, tiny: Path, tmp_path: Path) -> None:
    result = optimize(
        tiny, tmp_path / "out", targets=["evaluator"], preset="exact", shapes=[{"batch": 1, "sequence": 8}]
    )
    record = result.manifest.targets["evaluator"]
    assert record.checked_with == "evaluator"
    assert record.comparison["logits"]["max_abs"] < 1e-5
    assert (tmp_path / "out" / "evaluator" / "evaluated_model.onnx").is_file()


@pytest.mark.slow
def test_a_wrong_pass_is_caught_named_undone_and_reproduced(
    installed: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Recipe(("fold-constants", "negate-gelu", "fuse-attention"))
    monkeypatch.setattr(OnnxRuntime, "presets", {"exact": (wrong,)})
    result = optimize(tiny, tmp_path / "out", preset="exact", clock=all_equal)
    record = result.manifest.targets["onnxruntime"]
    (undone,) = record.rolled_back
    assert undone.text == "negate-gelu"
    assert "negate-gelu moved the outputs: max_rel of logits is" in undone.reason
    assert [step.text for step in record.passes] == ["fold-constants", "fuse-attention"]
    assert record.comparison["logits"]["max_rel"] < 1e-5
    (note,) = result.notes
    command = shlex.split(note.partition("reproduce with: ")[2])
    again = subprocess.run(
        [sys.executable, "-m", "planish.optimizer.cli", *command[1:]], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == CheckFailed.exit_code
    assert "negate-gelu moved the outputs" in again.stderr
    assert not Path(command[command.index("-o") + 1]).exists()


@pytest.mark.slow
def test_a_wrong_pass_of_an_explicit_pipeline_ends_the_run(
    installed: Path, tiny: Path, tmp_path: Path, command: Planish
) -> None:
    done = command("optimize", tiny, "-o", tmp_path / "out", "--pipeline", "fold-constants,negate-gelu")
    assert done.returncode == 1
    assert "negate-gelu moved the outputs" in done.stderr
    assert "reproduce with: planish opt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
