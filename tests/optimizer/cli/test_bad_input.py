"""Bad input: one clear line, the documented exit code, no traceback, nothing on disk lost or half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.optimizer.cli import main
from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.checkpoint.weights import read_header, read_index
from tests.train import MODELS

USAGE, BAD_INPUT, MISSING = 2, 3, 4


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of the command line, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.getvalue()


def refused(code: int, message: str, *arguments: object) -> None:
    """The command must fail with ``code`` and one line that contains ``message``."""
    got, said = run(*arguments)
    assert got == code, said
    assert message in said, said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("planish: error: ")]) == 1, said


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    path.write_text(json.dumps(config))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def rewrite_header(folder: Path, change: Callable[[dict[str, dict[str, Any]]], object]) -> None:
    """Change the header of a safetensors file, leaving the data alone."""
    raw = weights(folder).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_tensor(header: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def overlap(header: dict[str, dict[str, Any]]) -> None:
    """Let the last tensor begin four bytes early."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    last = max(entries, key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [offset - 4 for offset in last["data_offsets"]]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def pickle_only(folder: Path) -> None:
    weights(folder).rename(folder / "pytorch_model.bin")


def shard_missing(folder: Path) -> None:
    names = list(read_header(weights(folder)))
    table = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {names[0]: "model-00002-of-00002.safetensors"}
    weights(folder).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def shard_outside(folder: Path) -> None:
    weights(folder).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def sharded(folder: Path, *, twice: int = 0, absent: int = 0) -> None:
    """Two shards and their index; ``twice`` tensors lie in both, ``absent`` ones are named that lie in none."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights(folder))
    names = sorted(tensors)
    halves = (names[: len(names) // 2 + twice], names[len(names) // 2 :])
    files = [f"model-0000{index + 1}-of-00002.safetensors" for index in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
    weights(folder).unlink()
    table = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    table |= {f"transformer.h.{9 + index}.ln_1.weight": files[1] for index in range(absent)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "there is no such file or folder"),
    "no config.json": (remove("config.json"), "there is no config.json"),
    "config is not JSON": (write("config.json", b"{"), "this is not JSON"),
    "config is a list": (write("config.json", b"[]"), "this holds no JSON object"),
    "config without model_type": (lambda f: configure(f, model_type=None), "it names no model_type"),
    "no architecture": (lambda f: configure(f, architectures=None), "config.json names no architecture"),
    "architecture without a task": (
        lambda f: configure(f, architectures=["BertForPreTraining"]),
        "does not tell its task",
    ),
    "architecture of another task": (
        lambda f: configure(f, architectures=["DetrForObjectDetection"]),
        "serves object-detection",
    ),
    "a decoder without a cache": (
        lambda f: configure(f, architectures=["BertLMHeadModel"]),
        "BertLMHeadModel makes no cache: it is not a decoder",
    ),
    "unknown architecture": (
        lambda f: configure(f, model_type="bertoid"),
        "transformers has no architecture 'bertoid'",
    ),
    "remote code": (lambda f: configure(f, auto_map={"AutoModel": "evil.Model"}), "asks for code from outside"),
    "remote kernel": (lambda f: configure(f, attn_implementation="org/kernel"), "asks for code from outside"),
    "code in a nested configuration": (
        lambda f: configure(f, text_config={"auto_map": {"a": "b"}}),
        "'text_config.auto_map'",
    ),
    "sizes that do not fit": (lambda f: configure(f, intermediate_size=44), "config.json describes [44"),
    "sizes that cannot be": (lambda f: configure(f, num_attention_heads=5), "cannot be built from it"),
    "more layers than weights": (lambda f: configure(f, num_hidden_layers=3), "the checkpoint has no weights for"),
    "pickle only": (pickle_only, "a format that can run code when it is read"),
    "no weights": (remove("model.safetensors"), "there is no model.safetensors"),
    "empty weights": (write("model.safetensors", b""), "its header is longer than the file"),
    "garbage": (write("model.safetensors", os.urandom(4096)), "this is not a whole safetensors file"),
    "truncated": (lambda f: os.truncate(weights(f), weights(f).stat().st_size - 10), "the file is cut off"),
    "bytes too many": (lambda f: weights(f).open("ab").write(b"more"), "belong to no tensor"),
    "header lies about a shape": (
        lambda f: rewrite_header(f, lambda h: first_tensor(h).update(shape=[7, 7])),
        "a tensor of shape (7, 7)",
    ),
    "header lies about a type": (
        lambda f: rewrite_header(f, lambda h: first_tensor(h).update(dtype="F99")),
        "unknown element type 'F99'",
    ),
    "tensors overlap": (lambda f: rewrite_header(f, overlap), "the tensor before it"),
    "shard missing": (shard_missing, "shard 'model-00002-of-00002.safetensors' is missing"),
    "shard outside of the folder": (shard_outside, "lies outside the checkpoint's folder"),
    "tokenizer configuration is not JSON": (write("tokenizer_config.json", b"{"), "this is not JSON"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, message = CHECKPOINTS[name]
    damage(checkpoint)
    refused(BAD_INPUT, message, "optimize", checkpoint, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path != checkpoint) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: sharded(f, absent=2),
            "2 tensors of the index are in no shard, 'transformer.h.10.ln_1.weight' the first",
        ),
        (lambda f: sharded(f, twice=1), "lies in two shards, 'model-00001-of-00002.safetensors' and 'model-00002-of-0"),
    ],
    ids=["tensors absent", "a tensor twice"],
)
def test_shards_of_a_generator(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS / "writer", tmp_path / "checkpoint"))
    damage(folder)
    refused(BAD_INPUT, message, "optimize", folder, "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_whole_shards_are_read_as_one_file(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS / "writer", tmp_path / "checkpoint"))
    whole = {name: tensor.read() for name, tensor in read_index(folder).items()}
    sharded(folder)
    parts = {name: tensor.read() for name, tensor in read_index(folder).items()}
    assert whole.keys() == parts.keys()
    assert all((parts[name] == array).all() for name, array in whole.items())


def test_a_task_that_the_checkpoint_has_no_head_for(checkpoint: Path, tmp_path: Path) -> None:
    refused(
        BAD_INPUT,
        "the checkpoint has no weights for",
        "optimize",
        checkpoint,
        "-o",
        tmp_path / "o",
        "--task",
        "fill-mask",
    )
    configure(checkpoint, model_type="gpt2", architectures=["GPT2ForSequenceClassification"])
    refused(BAD_INPUT, "has no head for fill-mask", "optimize", checkpoint, "-o", tmp_path / "o", "--task", "fill-mask")


REQUESTS: dict[str, tuple[list[str], str]] = {
    "unknown preset": (["--preset", "exat"], "unknown preset 'exat' (did you mean 'exact'?)"),
    "unknown target": (["--target", "onnxruntme"], "unknown target 'onnxruntme' (did you mean 'onnxruntime'?)"),
    "unknown option of a target": (
        ["--target", "onnxruntime{thread=2}"],
        "unknown option 'thread' (did you mean 'threads'?)",
    ),
    "a target twice": (["--target", "openvino", "--target", "openvino{threads=1}"], "each target must be given once"),
    "two targets in one": (["--target", "openvino,onnxruntime"], "expected one target, found 2"),
    "unknown pass": (["--pipeline", "fuse-atention"], "unknown pass 'fuse-atention' (did you mean 'fuse-attention'?)"),
    "unknown option of a pass": (["--pipeline", "prune-ffn{kep=1}"], "unknown option 'kep' (did you mean 'keep'?)"),
    "malformed pipeline": (
        ["--pipeline", "prune-ffn{keep=0.5"],
        "expected an option or '}', found the end at column 19",
    ),
    "preset and pipeline": (["--preset", "exact", "--pipeline", "fold-constants"], "exclude each other"),
    "unknown task": (["--task", "text-clasification"], "unknown task 'text-clasification' (did you mean"),
    "unknown metric": (["--keep", "cosin>=1"], "unknown metric 'cosin'"),
    "malformed shape": (["--shape", "batch=x"], "cannot read the sizes 'batch=x'"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(name: str, tiny: Path, tmp_path: Path) -> None:
    arguments, message = REQUESTS[name]
    refused(USAGE, message, "optimize", tiny, "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    refused(BAD_INPUT, "this exists and is not a folder", "optimize", tiny, "-o", tmp_path / "file")
    refused(BAD_INPUT, "is not an output of planish", "optimize", tiny, "-o", tmp_path / "folder")
    refused(BAD_INPUT, "this is a link, which is neither followed", "optimize", tiny, "-o", tmp_path / "link")
    refused(BAD_INPUT, "this cannot be written", "optimize", tiny, "-o", tmp_path / "file" / "below")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_other_commands(tmp_path: Path, tiny: Path) -> None:
    refused(BAD_INPUT, "there is no planish.json", "verify", tmp_path)
    refused(BAD_INPUT, "there is no such file or folder", "bench", tmp_path / "gone.onnx")
    refused(BAD_INPUT, "this holds no engine; a checkpoint is built first", "bench", tiny)
    refused(USAGE, "give either --text, or --input and --output", "run", tmp_path)
    refused(BAD_INPUT, "this holds no engine", "run", tmp_path, "--text", "x")
    refused(USAGE, "give either --pipeline or --preset", "opt", tmp_path / "x.onnx", "-o", tmp_path / "y.onnx")
    code, said = run("optimise")
    assert (code, "did you mean 'optimize'" in said) == (USAGE, True)


@pytest.mark.slow
def test_a_missing_runtime(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "planish.backends.openvino.target.OpenVino.missing", classmethod(lambda cls: "openvino is not installed")
    )
    refused(
        MISSING,
        "openvino is not installed",
        "optimize",
        tiny,
        "-o",
        tmp_path / "out",
        "--target",
        "openvino",
    )
    assert not (tmp_path / "out").exists()


def test_calibration_files(tiny: Path, tmp_path: Path) -> None:
    from planish.optimizer.calibration.data import Samples
    from planish.optimizer.ir.program import Signature, TensorSpec

    signature = Signature((TensorSpec("x", ir.DataType.FLOAT, ("batch", 2)),), ())

    def failure(name: str, tokenizer: object = None) -> str:
        with pytest.raises(BadInput) as caught:
            Samples.of(tmp_path / name).reference(signature, tokenizer)
        return str(caught.value)

    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "keys.jsonl").write_text('{"a": "x", "b": "y"}\n')
    np.savez(tmp_path / "keys.npz", y=np.zeros(2))
    np.savez(tmp_path / "type.npz", x=np.array([["a", "b"]]))
    np.savez(tmp_path / "nan.npz", x=np.array([[np.nan, 0]], np.float32))
    (tmp_path / "not.npz").write_bytes(b"no archive")
    assert "there is no such file" in failure("gone.txt")
    assert "texts need a tokenizer" in failure("empty.txt")
    assert "this file holds no text" in failure("empty.txt", object())
    assert "line 2: this is not JSON" in failure("bad.jsonl", object())
    assert "line 1: byte 4 of this line (0xe9) is not UTF-8" in failure("latin.txt", object())
    assert "line 1: this is nested deeper than 64 levels" in failure("deep.jsonl", object())
    assert "line 1: this line has no field 'text'" in failure("keys.jsonl", object())
    assert "it has no array 'x'; it has ['y']" in failure("keys.npz")
    assert "is <U1, not float32" in failure("type.npz")
    assert "holds NaN or infinity" in failure("nan.npz")
    assert "is not an .npz file of plain arrays" in failure("not.npz")
