"""Bad input: one clear line, the documented exit code, no traceback, nothing on disk lost or half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
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


def graph(*nodes: onnx.NodeProto, opset: int = 23, domain: str = "") -> onnx.ModelProto:
    """A model of one float input x [2,2], one output r, and a weight w."""
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    border = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, 64]) for name in "xr"]
    made = oh.make_graph(
        nodes or [oh.make_node("MatMul", ["x", "w"], ["r"], name="product")], "g", border[:1], border[1:], [weight]
    )
    imports = [oh.make_opsetid("", opset)] + ([oh.make_opsetid(domain, 1)] if domain else [])
    return oh.make_model(made, opset_imports=imports, ir_version=10)


def external(folder: Path, **entries: object) -> Path:
    """The model with its weight in `w.bin`, and lies about it."""
    model = graph()
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    stored = onnx.load_model(path, load_external_data=False)
    tensor = stored.graph.initializer[0]
    facts = {entry.key: entry.value for entry in tensor.external_data} | {
        key: str(value) for key, value in entries.items()
    }
    del tensor.external_data[:]
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(stored.SerializeToString())
    return path


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def link(folder: Path, how: Callable[[Path, Path], object]) -> Path:
    path = external(folder)
    (folder / "w.bin").rename(folder / "real.bin")
    how(folder / "real.bin", folder / "w.bin")
    return path


def cut(folder: Path, size: int) -> Path:
    path = external(folder)
    os.truncate(folder / "w.bin", size)
    return path


def raw(folder: Path, content: bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "nothing.onnx", "there is no such file"),
    "not ONNX": (lambda f: raw(f, b"PK\x03\x04" + os.urandom(999)), "this is not an ONNX model, or it is cut off"),
    "empty": (lambda f: raw(f, b""), "this file holds no graph"),
    "truncated": (lambda f: raw(f, graph().SerializeToString()[:-9000]), "this is not an ONNX model, or it is cut off"),
    "unknown operator": (
        lambda f: saved(f, graph(oh.make_node("Frobnicate", ["x"], ["r"]))),
        "no operator 'Frobnicate'",
    ),
    "unknown domain": (
        lambda f: saved(f, graph(oh.make_node("Relu", ["x"], ["r"], domain="com.example"), domain="com.example")),
        "of a domain that no target runs",
    ),
    "too old an opset": (lambda f: saved(f, graph(opset=9)), "it is written in opset 9; export it at opset 11"),
    "external data missing": (lambda f: external(f, location="gone.bin"), "external data 'gone.bin' is missing"),
    "external data above": (lambda f: external(f, location="../w.bin"), "lies outside the model's folder"),
    "external data absolute": (lambda f: external(f, location="/etc/passwd"), "lies outside the model's folder"),
    "external data short": (lambda f: cut(f, 100), "external data 'w.bin' is too short: 100 bytes"),
    "external data behind its end": (lambda f: external(f, offset=10**9), "is too short"),
    "external data of another length": (lambda f: external(f, length=12), "has 12 bytes at"),
    "external data at no number": (lambda f: external(f, offset="x"), "is not a number"),
    "external data a symbolic link": (lambda f: link(f, lambda a, b: b.symlink_to(a)), "is a symbolic link"),
    "external data a hard link": (lambda f: link(f, lambda a, b: b.hardlink_to(a)), "is a hard link"),
    "dangling input": (lambda f: saved(f, graph(oh.make_node("Relu", ["nowhere"], ["r"]))), "nowhere"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["optimize", "opt"])
def test_onnx_files(name: str, command: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    target = ["--pipeline", "fold-constants"] if command == "opt" else []
    refused(BAD_INPUT, message, command, make(folder), "-o", tmp_path / "out.onnx", *target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


def test_a_missing_runtime(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "planish.backends.openvino.target.OpenVino.missing", classmethod(lambda cls: "openvino is not installed")
    )
    saved(tmp_path, graph())
    refused(
        MISSING,
        "openvino is not installed",
        "optimize",
        tmp_path / "model.onnx",
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


def test_no_place_for_temporary_files(tmp_path: Path) -> None:
    planish = Path(sys.executable).with_name("planish")
    command = f"ulimit -f 0; exec {planish} optimize {MODELS / 'writer'} -o {tmp_path / 'out'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (3, 5), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 300])
def test_a_disk_that_fills_while_engines_are_built(limit: int, tmp_path: Path) -> None:
    """In the process of the original, which writes its outputs, and in our own."""
    planish = Path(sys.executable).with_name("planish")
    command = f"ulimit -f {limit}; exec {planish} optimize {MODELS / 'writer'} -o {tmp_path / 'out' / 'w'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "there is no room to write" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
