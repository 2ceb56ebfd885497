"""Lowering in several threads of one process."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from planish.optimizer.lowering import lower

with ThreadPoolExecutor(2) as pool:
    for lowered in pool.map(lower, map(Path, sys.argv[1:])):
        print(lowered.program.provenance.architecture)
"""


@pytest.mark.breadth
def test_two_threads_lower_in_a_new_process(tiny: Path) -> None:
    """Neither has imported transformers before."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, tiny, tiny], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BertForSequenceClassification"] * 2
