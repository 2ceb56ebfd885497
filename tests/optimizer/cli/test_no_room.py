"""A disk that is full, or where nothing may be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import MODELS

FILLING = """
import resource, sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from planish.optimizer.ir import onnx_io
from planish.optimizer.cli.failures import exit_code_of
from planish.optimizer.system.staging import staged_folder
model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> g (float[4] x) => (float[4] r) { r = Relu (x) }')
weight = ir.tensor(np.zeros(1_000_000, np.float32), name="w")
model.graph.register_initializer(ir.Value(name="w", const_value=weight, shape=weight.shape))
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    with staged_folder(Path(sys.argv[1])) as folder:
        onnx_io.save(model, folder / "model.onnx")
except Exception as error:
    sys.exit(exit_code_of(error))
"""


@pytest.mark.slow
def test_a_disk_that_fills_while_weights_are_streamed(tmp_path: Path) -> None:
    """Four megabytes of weights where two may be written."""
    done = subprocess.run([sys.executable, "-c", FILLING, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "there is no room to write" in done.stderr
    assert list(tmp_path.iterdir()) == []


NOWHERE_TO_WRITE = """
import resource, sys
from planish.optimizer.cli.failures import exit_code_of
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    [].pop()
except Exception as error:
    sys.exit(exit_code_of(error))
"""


def test_a_bug_is_told_where_no_file_can_be_written() -> None:
    """Its traceback cannot be kept, so that the line says where it happened."""
    done = subprocess.run([sys.executable, "-c", NOWHERE_TO_WRITE], capture_output=True, text=True)
    assert done.returncode == 70, done.stderr
    assert done.stderr == (
        "planish: error: a bug of ours: IndexError: pop from empty list; "
        "please report it; it happened in <string>, line 6\n"
    )


@pytest.mark.slow
def test_no_place_for_temporary_files(tmp_path: Path) -> None:
    planish = Path(sys.executable).with_name("planish")
    command = f"ulimit -f 0; exec {planish} optimize {MODELS / 'writer'} -o {tmp_path / 'out'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (3, 5), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.breadth
@pytest.mark.parametrize("limit", [2_000, 300])
def test_a_disk_that_fills_while_engines_are_built(limit: int, tmp_path: Path) -> None:
    """In the process of the original, which writes its outputs, and in our own."""
    planish = Path(sys.executable).with_name("planish")
    command = f"ulimit -f {limit}; exec {planish} optimize {MODELS / 'writer'} -o {tmp_path / 'out' / 'w'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "there is no room to write" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
