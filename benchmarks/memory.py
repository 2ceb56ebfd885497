"""Memory and time of builds under a hard limit: `python -m benchmarks.memory SUBJECT`.

A decoder larger than memory over its depth: written as it is (`exact`), checked against the original (`checked`), or
rounded to 4 bits (`nearest`, `hqq`); and one of half a billion parameters rounded by GPTQ over the number of texts that
it is calibrated on (`gptq`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from benchmarks.record import canvas, record, results
from benchmarks.subjects import PLACE, qwen2
from planish.optimizer import optimize

_DEPTHS = (8, 16, 32)
_POLL_SECONDS = 0.05
_CGROUP = Path(f"/sys/fs/cgroup/memory/planish-benchmark-{os.getpid()}")
_LAYERS = 32
_REFERENCE = 8
"""Cases that are kept apart from those that are calibrated on."""
_LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rope_theta": 500_000.0,
}  # fmt: skip
"""The shape of Llama-3-8B, 16 GB in bf16."""
_LLAMA_2B = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
"""A shape that is twice as narrow, 4.2 GB in bf16."""


def llama(sizes: dict[str, Any], folder: Path) -> Path:
    """A checkpoint of 32 layers in bf16, a shard for each; weights are drawn once and turned by one element a layer."""
    if folder.exists():
        return folder
    import ml_dtypes
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    making = folder.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    generator = np.random.default_rng(0)
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    keys = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]

    def drawn(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    layer = {
        **{f"self_attn.{n}_proj.weight": drawn(rows, width) for n, rows in (("q", width), ("k", keys), ("v", keys))},
        "self_attn.o_proj.weight": drawn(width, width),
        **{f"mlp.{name}_proj.weight": drawn(inner, width) for name in ("gate", "up")},
        "mlp.down_proj.weight": drawn(width, inner),
        **{f"{name}_layernorm.weight": drawn(width) for name in ("input", "post_attention")},
    }
    rest = {
        "model.embed_tokens.weight": drawn(vocabulary, width),
        "lm_head.weight": drawn(vocabulary, width),
        "model.norm.weight": drawn(width),
    }
    shards = {
        f"layer-{i:02d}.safetensors": {f"model.layers.{i}.{n}": t for n, t in layer.items()} for i in range(_LAYERS)
    }
    index: dict[str, str] = {}
    for name, tensors in {**shards, "rest.safetensors": rest}.items():
        save_file(tensors, making / name)
        index |= dict.fromkeys(tensors, name)
    (making / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=_LAYERS,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(making)
    making.rename(folder)
    return folder


def shallower(checkpoint: Path, depth: int, folder: Path) -> Path:
    """The same shards with a configuration of fewer layers."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": depth}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Run:
    """One build."""

    seconds: float
    anonymous_peak_bytes: int
    """Most memory of the process and its children together that no file stands behind."""
    written_bytes: int


def build(command: list[str], out: Path, limit: int) -> Run:
    """Build under a hard limit of memory, where the system lets us set one."""
    peak = [0]
    start = time.perf_counter()
    process = subprocess.Popen(_limited(command, limit), stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    if code != 0:
        raise SystemExit(f"failed with exit code {code}: {' '.join(command)}")
    return Run(seconds, peak[0], sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))


def _limited(command: list[str], limit: int) -> list[str]:
    """The command under a hard memory limit (a control group of version 1), or as it is where none can be set."""
    try:
        _CGROUP.mkdir(exist_ok=True)
        (_CGROUP / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        return command
    return ["sh", "-c", f'echo $$ > {_CGROUP}/cgroup.procs && exec "$@"', "sh", *command]


def _watch(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.poll() is None:
        with suppress(psutil.Error):  # it has just ended
            root = psutil.Process(process.pid)
            peak[0] = max(peak[0], sum(_anonymous(one.pid) for one in [root, *root.children(recursive=True)]))
        time.sleep(_POLL_SECONDS)


def _anonymous(pid: int) -> int:
    """Bytes that no file stands behind; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def plot(runs: dict[int, Run], subject: Subject, path: Path) -> None:
    """Peak of anonymous memory, beside the size of the engine."""
    figure, axes = canvas(6, 3.5)
    points = list(runs)
    axes.plot(points, [run.anonymous_peak_bytes / 1e9 for run in runs.values()], "o-", label="peak of planish")
    axes.plot(points, [run.written_bytes / 1e9 for run in runs.values()], "s--", label="engine written")
    axes.set(xlabel=subject.axis, ylabel="GB", ylim=(0, None), xticks=points, title=subject.title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@dataclass(frozen=True)
class Subject:
    """What is built, and under which limit."""

    what: str
    title: str
    axis: str
    points: tuple[int, ...]
    limit_gib: float
    command: Callable[[Path, int, Path], list[str]]
    """Of the folder of checkpoints, a point on the axis and a scratch folder, in which `out` is to be written."""


def _deep(sizes: dict[str, Any], checkpoint: str, *options: str) -> Callable[[Path, int, Path], list[str]]:
    def command(place: Path, depth: int, scratch: Path) -> list[str]:
        folder = shallower(llama(sizes, place / checkpoint), depth, scratch / "checkpoint")
        planish = [sys.executable, "-m", "planish.optimizer.cli", "optimize", str(folder)]
        return [*planish, "-o", str(scratch / "out"), "--target", "onnxruntime", *options]

    return command


def _many(_: Path, samples: int, scratch: Path) -> list[str]:
    qwen2()
    code = "import sys; from benchmarks.memory import calibrated; calibrated(int(sys.argv[1]), sys.argv[2])"
    return [sys.executable, "-c", code, str(samples), str(scratch / "out")]


def calibrated(samples: int, out: str) -> None:
    """Round Qwen2-0.5B's shape by GPTQ, on so many texts of 128 random tokens."""
    rng = np.random.default_rng(0)
    texts = [{"input_ids": rng.integers(5, 151_000, (1, 128))} for _ in range(samples + _REFERENCE)]
    rounding = f"quantize-weights{{bits=4 method=gptq}},{_NBITS}"
    optimize(qwen2(), out, pipeline=rounding, reference="none", calibration=texts, samples=samples)


_NONE = ("--reference", "none")
_NBITS = "use-matmul-nbits"
SUBJECTS = {
    "exact": Subject(
        "A checkpoint of the shape of Llama-3-8B in bf16, --reference none",
        "Llama-3-8B shape, bf16 to fp32",
        "layers",
        _DEPTHS,
        6.0,
        _deep(_LLAMA_8B, "memory", *_NONE),
    ),
    "checked": Subject(
        "A checkpoint of the shape of a 2-billion-parameter Llama in bf16, --reference offload",
        "2-billion-parameter Llama, bf16 to fp32, --reference offload",
        "layers",
        _DEPTHS,
        3.0,
        _deep(_LLAMA_2B, "memory-checked", "--reference", "offload"),
    ),
    **{
        method: Subject(
            f"A checkpoint of the shape of Llama-3-8B in bf16, to 4 bits by {method}, --reference none",
            f"Llama-3-8B shape, bf16 to 4 bits, {method}",
            "layers",
            _DEPTHS,
            6.0,
            _deep(_LLAMA_8B, "memory", *_NONE, "--pipeline", f"quantize-weights{{bits=4 {options}}},{_NBITS}"),
        )
        for method, options in (("nearest", "method=nearest"), ("hqq", "symmetric=false method=hqq"))
    },
    "gptq": Subject(
        "Qwen2-0.5B's shape to 4 bits by gptq, on texts of 128 tokens, --reference none",
        "Qwen2-0.5B shape, 4 bits by gptq",
        "texts",
        (8, 32, 128),
        3.0,
        _many,
    ),
}


@click.command()
@click.argument("name", type=click.Choice(list(SUBJECTS)), default="exact")
@click.option("--limit-gib", type=float, help="Hard limit of memory, where one can be set; 6 or 3 if not given.")
@click.option("--place", type=click.Path(path_type=Path), default=PLACE, help="Where up to 50 GB are free.")
def main(name: str, limit_gib: float | None, place: Path) -> None:
    """Build NAME under a limit, three times."""
    subject = SUBJECTS[name]
    limit = limit_gib or subject.limit_gib
    runs: dict[int, Run] = {}
    for point in subject.points:
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            command = subject.command(place, point, Path(scratch))
            runs[point] = build(command, Path(scratch) / "out", int(limit * 2**30))
        print(f"{point} {subject.axis}: {runs[point]}", file=sys.stderr)
    limited = "no limit could be set here"
    if _CGROUP.is_dir():
        limited = f"hard limit {limit:g} GiB"
        _CGROUP.rmdir()
    rows = [
        (str(point), f"{run.seconds:.0f}", f"{run.anonymous_peak_bytes / 1e9:.2f}", f"{run.written_bytes / 1e9:.1f}")
        for point, run in runs.items()
    ]
    file = "memory" if name == "exact" else f"memory-{name}"
    plot(runs, subject, results() / f"{file}.svg")
    columns = (subject.axis, "seconds", "peak GB, anonymous", "GB written")
    figures = {str(point): asdict(run) for point, run in runs.items()}
    record(file, f"{subject.what}, {limited}", columns, rows, figures, f"memory {name}")


if __name__ == "__main__":
    main()
