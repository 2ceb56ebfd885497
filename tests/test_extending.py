"""`docs/extending.md` is followed: its files are written, its commands run, its checks hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest

from planish.optimizer.interfaces import registry
from tests import golden
from tests.test_docs import BLOCK, ROOT

PAGE = ROOT / "docs" / "extending.md"
FOLDERS = ("optimizer", "passes", "backends")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Followed:
    """What the page makes of a copy of this tree."""

    tree: Path
    """The tree, in which methods and sections lie."""
    distribution: Path
    """The distribution with a pass and a backend."""
    site: Path
    """The folder that it is installed in."""

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(self.tree / ".typing"), str(self.site)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def files() -> Iterator[tuple[str, str, str]]:
    """Language, path and text of each block that is a file, or a change of one."""
    for language, text in BLOCK.findall(PAGE.read_text()):
        first, _, rest = text.partition("\n")
        if language != "console":
            assert first.startswith("# "), f"the block names no file: {first}"
            yield language, first.removeprefix("# "), rest


def changed(text: str, change: str) -> str:
    """A text with its lines `-` replaced by the lines `+`."""
    old, new = ("\n".join(re.findall(rf"^\{sign}(.*)", change, re.MULTILINE)) for sign in "-+")
    assert text.count(old) == 1, f"the page is out of date: {old!r}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    folder = tmp_path_factory.mktemp("extending")
    result = Followed(folder / "tree", folder / "distribution", folder / "site")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, result.tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".typing", result.tree / ".typing", symlinks=True)
    clock = result.tree / "optimizer" / "timing" / "interleaved.py"
    # Its commands run in processes of their own, and what is faster is nothing to the page.
    clock.write_text(changed(clock.read_text(), "-OPENINGS = 8\n+OPENINGS = 1"))
    for language, name, text in files():
        path = (result.tree if name.partition("/")[0] in FOLDERS else result.distribution) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changed(path.read_text(), text) if language == "diff" else text)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(result.site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(result.distribution)], check=True)
    return result


@pytest.fixture
def installed(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Followed]:
    """The distribution, importable in this process."""
    monkeypatch.syspath_prepend(str(followed.site))
    registry.table.cache_clear()
    yield followed
    registry.table.cache_clear()


def graph(path: Path, nodes: list[onnx.NodeProto], constant: onnx.TensorProto) -> None:
    """A file whose graph takes x and gives r, both of shape (rows, 8)."""
    borders = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", 8]) for name in "xr"]
    made = oh.make_graph(nodes, "g", borders[:1], borders[1:], [constant])
    onnx.save(oh.make_model(made, opset_imports=[oh.make_opsetid("", 23)], ir_version=10), path)


def test_the_commands_run(followed: Followed, tmp_path: Path) -> None:
    spelled = [
        oh.make_node("Abs", ["x"], ["a"]),
        oh.make_node("Add", ["a", "one"], ["s"]),
        oh.make_node("Div", ["x", "s"], ["r"]),
    ]
    graph(tmp_path / "softsign.onnx", spelled, nh.from_array(np.array(1, np.float32), "one"))
    weight = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    borders = [
        oh.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", size]) for n, size in (("x", 32), ("r", 8))
    ]
    product = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["r"])], "g", borders[:1], borders[1:], [nh.from_array(weight, "w")]
    )
    onnx.save(oh.make_model(product, opset_imports=[oh.make_opsetid("", 23)], ir_version=10), tmp_path / "product.onnx")
    printed = ""
    for language, block in BLOCK.findall(PAGE.read_text()):
        for command in block.splitlines() if language == "console" else ():
            line = command.replace("planish", f"{sys.executable} -m planish.optimizer.cli", 1)
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, env=followed.environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed += done.stdout
    assert "fuse-softsign (from your-package" in printed
    assert [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node] == ["Softsign"]
    assert (tmp_path / "out" / "yours" / "model.evaluated").is_file()
    assert "DequantizeLinear" in [node.op_type for node in onnx.load(tmp_path / "narrow.onnx").graph.node]
    assert (
        "<h2>Sizes</h2>\n<p>onnxruntime 0.0 MB</p>\n\n<h2>Built with"
        in (tmp_path / "reported" / "report.html").read_text()
    )


def test_the_golden_cases_hold(installed: Followed) -> None:
    cases = list(golden.read_cases(installed.distribution / "tests"))
    assert len(cases) == 2
    for case in cases:
        model, refusals = golden.run(case)
        assert golden.text_of(model) == case.out
        assert (
            [refusal.reason for refusal in refusals if case.refused[0] in refusal.reason]
            if case.refused
            else not refusals
        )
        for one, other in zip(golden.outputs(case.model()), golden.outputs(model), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-6)


def test_the_backend_conforms(followed: Followed) -> None:
    script = followed.distribution / "tests" / "test_yours.py"
    done = subprocess.run([sys.executable, script], env=followed.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    always = "'missing-runtime': 'planish itself needs onnx: it is always there'"
    assert done.stdout.splitlines() == [
        f"{{{always}}}", f"{{'threads': 'the runtime is called by one thread', {always}}}", "None"
    ]  # fmt: skip


def test_the_method_rounds_a_part_of_the_range(followed: Followed) -> None:
    script = (
        "import numpy as np; from planish.passes.quantization.quantize_weights import QuantizeWeights; "
        "from planish.passes.quantization.methods import METHODS; "
        "matrix = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32); "
        "scales = [QuantizeWeights(method=name).weight_method.fit(matrix).scale for name in ('narrow', 'nearest')]; "
        "np.testing.assert_allclose(scales[0], scales[1] * 0.9, rtol=1e-5)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=followed.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
