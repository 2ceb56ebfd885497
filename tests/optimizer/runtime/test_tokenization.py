"""The core of a tokenizer by itself: the same as transformers' where a record says so, and no record elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer import optimize
from planish.optimizer.inference.session import open_task
from planish.optimizer.inference.text_tasks import TextTasks
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.tokenization import LightTokenizer, TokenizerRecord, light_record
from tests.sentences import sentences

OPTIONS: list[dict[str, Any]] = [
    {"padding": True, "return_tensors": "np"},
    {"padding": True, "truncation": True, "max_length": 7, "return_tensors": "np"},
    {"padding": "max_length", "truncation": True, "max_length": 30, "return_tensors": "np"},
    {"padding": True, "return_offsets_mapping": True, "return_tensors": "np"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("left", [False, True])
def test_it_gives_what_transformers_gives(options: dict[str, Any], left: bool, minilm: Path) -> None:
    theirs: Any = load_tokenizer(minilm)
    theirs.padding_side = "left" if left else "right"
    record = light_record(theirs, minilm)
    assert record is not None
    ours = LightTokenizer(minilm, record)
    texts = [*sentences(6), "", "naïve 日本語 \U0001f600"]
    for pairs in ((), (texts[::-1],)):
        found, expected = ours(texts, *pairs, **options), theirs(texts, *pairs, **options)
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
        assert [found.sequence_ids(i) for i in range(len(texts))] == [
            expected.sequence_ids(i) for i in range(len(texts))
        ]
    assert ours("one text")["input_ids"] == theirs("one text")["input_ids"]


def test_there_is_no_record_of_what_is_not_the_same(minilm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))
    assert light_record(load_tokenizer(minilm), folder) is None


@pytest.mark.slow
def test_run_needs_neither_torch_nor_transformers(tiny: Path, tmp_path: Path) -> None:
    optimize(tiny, tmp_path / "out", pipeline="fold-constants", reference="none")
    assert isinstance(Manifest.read(tmp_path / "out").tokenizer, TokenizerRecord)
    script = (
        "import sys; from planish.optimizer import load; print(load('out')('w1 w2')['label']);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    task = open_task(tmp_path / "out")
    assert isinstance(task, TextTasks)
    assert isinstance(task.tokenizer, LightTokenizer)
    config = tmp_path / "out" / "onnxruntime" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 4}))  # no longer what was built
    changed = open_task(tmp_path / "out")
    assert isinstance(changed, TextTasks)
    assert not isinstance(changed.tokenizer, LightTokenizer)
    assert changed.longest == 4
