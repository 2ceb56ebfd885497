"""Exact engines beside every peer's fp32 files, over models and shapes: `python -m benchmarks.exact`.

For each model, shape and runtime all files run in one alternation. Batches of eight are padded to mixed lengths, evenly
from a quarter of the longest; decoders are padded on the left. Calls behind a cache hand tensors of the runtime in and
get them back, as IO binding does. Our engines are built for one text, and again for eight. On OpenVINO our encoders
are opened with buckets for both sizes of single texts; the files are those that take any size. optimum-intel's files
with a cache keep it in 16 bits: they are shown as they are, and compared with once they say 32, as exact ones must.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import machine, record, results, settle_memory
from benchmarks.subjects import (
    PEERS,
    PLACE,
    TARGETS,
    Refused,
    bert_base,
    distilbert,
    gpt2,
    made,
    minilm,
    optimum_export,
    qwen2,
    run,
    t5_small,
    torch_export,
)
from planish.optimizer import optimize
from planish.optimizer.errors import PlanishError
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Arrays, Role, Signature
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.worker import EngineRef, Worker
from planish.optimizer.timing.interleaved import OPENINGS, Timing, time_interleaved

_SHAPES = ((1, 16), (1, 128), (8, 128))
"""Texts and tokens; behind a cache, texts and tokens in the cache."""
OPTIMUM_INTEL = Path("build") / "interop" / "openvino-2026.4.1-env"
_LEVELS = ("O1", "O2", "O3")
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FullyConnected")
_OURS = "planish exact"
_ROUNDED, _UNROUNDED = "optimum-intel", "optimum-intel, cache in f32"
_STATEFUL = "openvino_decoder_model.xml"
"""How optimum-intel calls the decoder of an encoder-decoder, for its first step and all others."""


@dataclass(frozen=True)
class Model:
    """A checkpoint, how peers are asked for it, and the parts that are timed."""

    name: str
    make: Callable[[], Path]
    task: str
    family: str
    """What ONNX Runtime's optimizer of transformers calls it; nothing if it knows no such type."""
    parts: Mapping[str, tuple[str, bool]]
    """What is timed -> its component, and whether that goes on behind a cache."""


_ENCODER = {"encoder": ("model", False)}
_DECODER = {"prefill": ("model", False), "decode": ("model", True)}
MODELS = {
    model.name: model
    for model in (
        Model("bert-base", bert_base, "feature-extraction", "bert", _ENCODER),
        Model("minilm", minilm, "feature-extraction", "bert", _ENCODER),
        Model("distilbert", distilbert, "feature-extraction", "bert", _ENCODER),
        Model("gpt2", gpt2, "text-generation-with-past", "gpt2", _DECODER),
        Model(
            "t5-small",
            t5_small,
            "text2text-generation-with-past",
            "t5",
            {"encoder": ("encoder_model", False), "decode": ("decoder_with_past_model", True)},
        ),
        Model("qwen2-0.5b", qwen2, "text-generation-with-past", "", _DECODER),
    )
}


def peers_of(model: Model) -> dict[str, tuple[str, Callable[[], Path]]]:
    """Label -> target, and what makes the folder or file that holds the components."""
    folder = PLACE / "plain" / model.name
    plain = folder / "optimum"
    found: dict[str, tuple[str, Callable[[], Path]]] = {
        "optimum export": (TARGETS[0], partial(made, plain, lambda: _optimum(model, plain)))
    }
    for level in _LEVELS:
        place = folder / f"optimum-{level}"
        found[f"optimum {level}"] = (TARGETS[0], partial(made, place, partial(_optimum_level, plain, level, place)))
    fused, scripted, dynamo = (folder / name for name in ("ort-transformers", "onnxscript", "dynamo"))
    found["onnxruntime.transformers"] = (TARGETS[0], partial(made, fused, lambda: _transformers(model, plain, fused)))
    found["torch.onnx.export"] = (TARGETS[0], partial(made, dynamo, lambda: _dynamo(model, dynamo)))
    found["onnxscript's fusions"] = (TARGETS[0], partial(made, scripted, lambda: _onnxscript(dynamo, scripted)))
    intel, precise = folder / "optimum-intel", folder / "optimum-intel-f32"
    found[_ROUNDED] = (TARGETS[1], partial(made, intel, lambda: _optimum_intel(model, intel)))
    if model.parts != _ENCODER:
        found[_UNROUNDED] = (TARGETS[1], partial(made, precise, lambda: _cache_in_f32(intel, precise)))
    found["torch.onnx.export, openvino"] = (TARGETS[1], partial(made, dynamo, lambda: _dynamo(model, dynamo)))
    return found


def _optimum(model: Model, place: Path) -> None:
    optimum_export(model.make(), place, model.task)


def _optimum_level(plain: Path, level: str, place: Path) -> None:
    run([PEERS / "bin" / "optimum-cli", "onnxruntime", "optimize", "--onnx_model", plain, "-o", place, f"-{level}"])
    for path in place.glob("*_optimized.onnx"):  # the loaders' names again
        path.rename(path.with_name(path.name.replace("_optimized", "")))


def _transformers(model: Model, plain: Path, place: Path) -> None:
    if not model.family:
        raise Refused("it knows no model of this type")
    config = json.loads((model.make() / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_attention_heads") or config.get("n_heads") or config.get("n_head") or config["num_heads"]
    width = config.get("hidden_size") or config.get("dim") or config.get("n_embd") or config["d_model"]
    place.mkdir()
    for part in sorted({component for component, _ in model.parts.values()}):
        command = [sys.executable, "-m", "onnxruntime.transformers.optimizer", "--model_type", model.family]
        sizes = ["--num_heads", heads, "--hidden_size", width, "--opt_level", 0]
        run([*command, "--input", plain / f"{part}.onnx", "--output", place / f"{part}.onnx", *sizes])


def _dynamo(model: Model, place: Path) -> None:
    """PyTorch's exporter: of an encoder as a user calls it, of what has a cache by way of our unchanged lowering."""
    place.mkdir()
    if model.parts == _ENCODER:
        torch_export(model.make(), place / "model.onnx", dynamo=True)
        return
    with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
        optimize(model.make(), f"{scratch}/out", targets=TARGETS[:1], pipeline="", reference="none")
        shutil.copytree(f"{scratch}/out/onnxruntime", place, dirs_exist_ok=True)


def _onnxscript(plain: Path, place: Path) -> None:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    place.mkdir()
    for source in sorted(plain.glob("*.onnx")):
        try:
            fused, _ = optimize_for_ort(ir.load(source))
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}"[:120]) from error
        ir.save(fused, place / source.name, external_data=f"{source.name}.data")


def _optimum_intel(model: Model, place: Path) -> None:
    if not OPTIMUM_INTEL.exists():
        subprocess.run(["make", str(OPTIMUM_INTEL)], check=True)
    exporter = [OPTIMUM_INTEL / "bin" / "python", "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    options = ["--library", "transformers", "--task", model.task, "--weight-format", "fp32"]
    run([*exporter, "--model", model.make(), *options, place])


def _cache_in_f32(source: Path, place: Path) -> None:
    shutil.copytree(source, place)
    for path in place.glob("*.xml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'(<KV_CACHE_PRECISION value=)"\w+"', r'\1"f32"', text), encoding="utf-8")


def ours(model: Model, texts: int) -> Path:
    """Our engines, built for this many texts: at the usual shapes for one."""
    folder = PLACE / "ours" / f"{model.name}-exact-{texts}"
    if not folder.exists():
        print(f"building {folder}", file=sys.stderr)
        cached = any(behind for _, behind in model.parts.values())
        shapes: list[dict[str, int]] = [] if texts == 1 else _sizes(texts, 128, cached)
        optimize(model.make(), folder, targets=TARGETS, preset="exact", shapes=shapes)
    return folder


def _sizes(texts: int, tokens: int, cached: bool) -> list[dict[str, int]]:
    prefill = {"batch": texts, "sequence": tokens, "encoder_sequence": tokens}
    return [prefill | {PAST: 0}, prefill | {"sequence": 1, PAST: tokens}] if cached else [prefill]


def case_of(signature: Signature, texts: int, tokens: int, behind: bool) -> Arrays:
    """Inputs of a component: ids, the mask, and a cache that is empty or holds ``tokens``."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(tokens, max(1, tokens // 4), texts).round().astype(np.int64)
    counts = np.arange(tokens)[None] < lengths[:, None]
    new = 1 if behind else tokens
    left = signature.cached and any(tensor.name == "attention_mask" for tensor in signature.inputs)
    mask = np.concatenate([counts[:, ::-1] if left else counts, np.ones((texts, int(behind)), bool)], axis=1)
    made: dict[str, np.ndarray] = {}
    for tensor in signature.inputs:
        if tensor.role is Role.TOKENS:
            made[tensor.name] = rng.integers(5, tensor.bound or 30_000, (texts, new))
        elif tensor.role is Role.MASK:  # an encoder's does not run over the decoder's tokens
            made[tensor.name] = (mask if left or not behind else counts).astype(np.int64)
        elif tensor.role is Role.CACHE:
            sizes = (texts, int(tensor.shape[1]), tokens if behind else 0, int(tensor.shape[3]))
            made[tensor.name] = rng.standard_normal(sizes).astype(np.float32)
    return made


@dataclass(frozen=True)
class Cell:
    """One model, shape and runtime: turns of every engine in each opening, in milliseconds, and what refused."""

    turns: Mapping[str, Sequence[Sequence[float]]]
    over: Mapping[str, Timing]
    """Our timing relative to each engine."""
    refused: Mapping[str, str]
    products: float
    """Share of the time of our engine that the runtime spends in matrix products, from its own profile."""

    def best(self) -> str:
        """The fastest peer that is as exact as ours."""
        out = {_OURS, _ROUNDED} if _UNROUNDED in self.turns else {_OURS}
        return min(self.turns.keys() - out, key=self.median)

    def median(self, label: str) -> float:
        """Of all turns of an engine."""
        return statistics.median(itertools.chain(*self.turns[label]))

    def over_best(self) -> Timing:
        """How many times as fast as the best peer."""
        return self.over[self.best()]


@cache
def field(name: str, part: str, target: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of the peers that run on a runtime, and what the others said."""
    model = MODELS[name]
    component, behind = model.parts[part]
    signature = Manifest.read(ours(model, 1)).signatures[component].signature()
    case = case_of(signature, *_SHAPES[0], behind)
    running: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for label, (where, make) in peers_of(model).items():
        if where != target:
            continue
        try:
            path = _file(make(), component, target)
            with Worker(EngineRef(target, path)) as worker:
                worker.run(_as_taken(case, path, model))
            running[label] = path
        except (Refused, PlanishError) as reason:
            refused[label] = str(reason)[:160]
    return running, refused


def measure(model: Model, part: str, shape: tuple[int, int], target: str, seconds: float, openings: int) -> Cell:
    """Everything that runs on a runtime, in one alternation."""
    component, behind = model.parts[part]
    texts, tokens = shape
    folder = ours(model, texts)
    backend = registry.backend(target)
    case = case_of(Manifest.read(folder).signatures[component].signature(), texts, tokens, behind)
    peers, refused = field(model.name, part, target)
    racing = {_OURS: backend.path_of(component, folder / backend.name), **peers}
    engines = [
        EngineRef(_opened(target, model, texts) if label == _OURS else target, path) for label, path in racing.items()
    ]
    settle_memory()
    cases = [_as_taken(case, path, model) for path in racing.values()]
    race = time_interleaved(engines, cases, seconds=seconds, openings=openings)
    over = {label: race.timings(number)[0] for number, label in enumerate(racing)}  # ours is the first
    share = _share_of_products(target, racing[_OURS], case)
    return Cell(dict(zip(racing, race.turns, strict=True)), over, refused, share)


def _opened(target: str, model: Model, texts: int) -> str:
    """How our engine is opened: an encoder of single texts on OpenVINO with copies for their sizes."""
    if target != TARGETS[1] or model.parts != _ENCODER or texts > 1:
        return target
    sizes = ",".join(f"{texts}x{tokens}" for texts, tokens in _SHAPES if texts == 1)
    return target.replace("}", f" buckets=[{sizes}]}}")


def _file(folder: Path, component: str, target: str) -> Path:
    """The file of a component in a peer's folder."""
    if target == TARGETS[1] and not (folder / f"{component}.onnx").exists():
        own = folder / f"openvino_{component}.xml"
        return own if own.exists() else folder / _STATEFUL
    return folder / f"{component}.onnx"


def _as_taken(case: Arrays, path: Path, model: Model) -> Arrays:
    """Inputs as a file takes them: optimum-intel's decoder behind an encoder computes its keys anew in every step."""
    if path.name != _STATEFUL:
        return case
    width = json.loads((model.make() / "config.json").read_text(encoding="utf-8"))["d_model"]
    states = np.zeros((*case["encoder_attention_mask"].shape, width), np.float32)
    return {name: array for name, array in case.items() if ".encoder." not in name} | {"encoder_hidden_states": states}


def _share_of_products(target: str, path: Path, case: Arrays) -> float:
    """Time in matrix products over the time in all operators, over ten calls."""
    spent = _onnxruntime_profile(path, case) if target == TARGETS[0] else _openvino_profile(target, path, case)
    return sum(time for kind, time in spent.items() if kind in _PRODUCTS) / sum(spent.values())


def _onnxruntime_profile(path: Path, case: Arrays) -> dict[str, float]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 2, True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        file = path / "model.onnx" if path.is_dir() else path
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        wanted = {port.name for port in session.get_inputs()}
        feeds = {name: array for name, array in case.items() if name in wanted}
        feeds |= {name: np.zeros_like(case["input_ids"]) for name in wanted - feeds.keys()}
        for _ in range(10):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            spent[kind] = spent.get(kind, 0.0) + event["dur"]
    return spent


def _openvino_profile(target: str, path: Path, case: Arrays) -> dict[str, float]:
    import openvino as ov

    backend: Any = registry.backend(target)
    file = path / backend.model_file if path.is_dir() else path
    compiled = ov.Core().compile_model(str(file), "CPU", {**backend._config(), "PERF_COUNT": True})
    engine: Any = type(backend.open(path))(ov, compiled)
    spent: dict[str, float] = {}
    for _ in range(10):
        engine.prepare(case)()
        for node in engine._pool.take().infer_request.profiling_info:  # the idle one, which just ran
            spent[node.node_type] = spent.get(node.node_type, 0.0) + node.real_time.total_seconds()
    return spent


@click.command()
@click.option(
    "--model",
    "names",
    multiple=True,
    type=click.Choice(list(MODELS)),
    help="Only this, keep others; all if none.",
)
@click.option(
    "--cell", "wanted", multiple=True, help="Only cells whose name holds this, as `decode, 8 x 128`; keep others."
)
@click.option("--seconds", default=60.0, show_default=True, help="For one model, shape and runtime.")
@click.option("--openings", default=OPENINGS, show_default=True, help="Times that all engines are opened anew.")
@click.option("--keep", is_flag=True, help="Measure the engines that were built before.")
def main(names: tuple[str, ...], wanted: tuple[str, ...], seconds: float, openings: int, keep: bool) -> None:
    """Time our engines beside the peers', and say how far the best of them is."""
    if not keep:
        for name in names or MODELS:
            for folder in (PLACE / "ours").glob(f"{name}-exact-[18]"):
                shutil.rmtree(folder)
    figures = _kept() if names or wanted else {}
    for model in map(MODELS.__getitem__, names or MODELS):
        for part, shape, target in itertools.product(model.parts, _SHAPES, TARGETS):
            what = f"{model.name} {part}", f"{shape[0]} x {shape[1]}", target.partition("{")[0]
            cell = ", ".join(what)
            if wanted and not any(text in cell for text in wanted):
                continue
            figures[cell] = _figures(measure(model, part, shape, target, seconds, openings))
            print(*_row(what, figures[cell]), sep=" | ", file=sys.stderr, flush=True)
            _write(figures)  # after each cell: a run takes long


def _kept() -> dict[str, Any]:
    """Figures that stand there: those that are not measured now stay, and say which machine gave them."""
    path = results() / "exact.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"figures": {}}
    return {what: {"machine": found["machine"], **own} for what, own in found["figures"].items()}


def _figures(cell: Cell) -> dict[str, Any]:
    return {
        "median_ms": {label: cell.median(label) for label in cell.turns},
        "best": cell.best(),
        "ours_over_best": cell.over_best().__dict__,
        "openings": len(cell.turns[_OURS]),
        "refused": dict(cell.refused),
        "share_of_products": cell.products,
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }


def _row(what: Sequence[str], own: Mapping[str, Any]) -> list[str]:
    best, found = own["best"], own["ours_over_best"]
    span = f"{found['speedup']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    theirs = f"{best}, {own['median_ms'][best]:.2f}"
    where = own["machine"].partition(",")[0].replace("(R)", "")
    return [*what, f"{found['median_ms']:.2f}", theirs, span, f"{own['share_of_products']:.0%}", where, own["measured"]]


def _write(figures: Mapping[str, Any]) -> None:
    cells = itertools.product(
        [f"{model.name} {part}" for model in MODELS.values() for part in model.parts],
        [f"{texts} x {tokens}" for texts, tokens in _SHAPES],
        [target.partition("{")[0] for target in TARGETS],
    )
    ordered = [what for what in map(", ".join, cells) if what in figures]
    rows = [_row(what.split(", "), figures[what]) for what in ordered]
    ratios: dict[str, list[float]] = {}
    for what in ordered:
        ratios.setdefault(what.split(", ")[-1], []).append(figures[what]["ours_over_best"]["speedup"])
    means = [
        ["geometric mean", "", runtime, "", "", f"{statistics.geometric_mean(own):.2f}", "", "", ""]
        for runtime, own in ratios.items()
    ]
    title = "Exact engines in fp32 beside the best of the peers, two threads: medians, ratios with 95 % intervals"
    columns = (
        "what",
        "texts x tokens",
        "runtime",
        "ours, ms",
        "best peer, ms",
        "times as fast",
        "in products",
        "on",
        "at",
    )
    record("exact", title, columns, [*rows, *means], {what: figures[what] for what in ordered})


if __name__ == "__main__":
    main()
