"""Memory and time of lowering a checkpoint larger than memory, over its depth: `python -m benchmarks.memory`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import psutil

from benchmarks.record import RESULTS, record
from benchmarks.subjects import PLACE

_DEPTHS = (8, 16, 32)
_POLL_SECONDS = 0.05
_CGROUP = Path("/sys/fs/cgroup/memory/planish-benchmark")
_SIZES = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32}
_GROUPS = 8


def llama_8b(folder: Path) -> Path:
    """A checkpoint of the shape of Llama-3-8B in bf16, 16 GB in shards, every layer with the same drawn weights."""
    if folder.exists():
        return folder
    import ml_dtypes
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    making = folder.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    generator = np.random.default_rng(0)
    width, inner, vocabulary = _SIZES["hidden_size"], _SIZES["intermediate_size"], _SIZES["vocab_size"]
    keys = width // _SIZES["num_attention_heads"] * _GROUPS

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
    shards = {f"layer-{i:02d}.safetensors": {f"model.layers.{i}.{n}": t for n, t in layer.items()} for i in range(32)}
    index: dict[str, str] = {}
    for name, tensors in {**shards, "rest.safetensors": rest}.items():
        save_file(tensors, making / name)
        index |= dict.fromkeys(tensors, name)
    (making / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = LlamaConfig(
        **_SIZES, num_hidden_layers=32, num_key_value_heads=_GROUPS, max_position_embeddings=8192,
        rope_theta=500_000.0, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
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
    """Most memory of the process that no file stands behind."""
    written_bytes: int


def build(checkpoint: Path, out: Path, limit: int) -> Run:
    """Build without a reference, under a hard limit of memory where the system lets us set one."""
    command = [sys.executable, "-m", "planish.optimizer.cli", "optimize", str(checkpoint), "-o", str(out)]
    peak = [0]
    start = time.perf_counter()
    process = subprocess.Popen(_limited([*command, "--reference", "none"], limit), stdout=subprocess.DEVNULL)
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
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except (OSError, psutil.Error):
            return
        sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")]
        peak[0] = max([peak[0], *sizes])
        time.sleep(_POLL_SECONDS)


def plot(runs: dict[int, Run], path: Path) -> None:
    """Peak of anonymous memory over depth, beside the size of the checkpoint."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    depths = list(runs)
    axes.plot(depths, [run.anonymous_peak_bytes / 1e9 for run in runs.values()], "o-", label="peak of planish")
    axes.plot(depths, [run.written_bytes / 1e9 for run in runs.values()], "s--", label="engine written")
    axes.set(xlabel="layers", ylabel="GB", ylim=(0, None), xticks=depths, title="Llama-3-8B shape, bf16 to fp32")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--limit-gib", default=6.0, show_default=True, help="Hard limit of memory, where one can be set.")
@click.option("--place", type=click.Path(path_type=Path), default=PLACE, help="Where 50 GB are free.")
def main(limit_gib: float, place: Path) -> None:
    """Lower and save 8, 16 and 32 layers of an 8-billion-parameter decoder."""
    checkpoint = llama_8b(place / "llama-8b")
    runs: dict[int, Run] = {}
    for depth in _DEPTHS:
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            folder = shallower(checkpoint, depth, Path(scratch) / "checkpoint")
            runs[depth] = build(folder, Path(scratch) / "out", int(limit_gib * 2**30))
        print(f"{depth} layers: {runs[depth]}", file=sys.stderr)
    limited = f"hard limit {limit_gib:g} GiB" if _CGROUP.is_dir() else "no limit could be set here"
    rows = [
        (str(depth), f"{run.seconds:.0f}", f"{run.anonymous_peak_bytes / 1e9:.2f}", f"{run.written_bytes / 1e9:.1f}")
        for depth, run in runs.items()
    ]
    plot(runs, RESULTS / "memory.svg")
    what = f"A checkpoint of Llama-3-8B shape in bf16, lowered and saved unchecked, {limited}"
    figures = {str(depth): asdict(run) for depth, run in runs.items()}
    record("memory", what, ("layers", "seconds", "peak GB, anonymous", "GB written"), rows, figures)


if __name__ == "__main__":
    main()
