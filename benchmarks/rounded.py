"""What decoders win and lose in few bits: `python -m benchmarks.rounded`.

Won: one step of the decoder of T5-small's shape, beside optimum's export in fp32. Lost: the tests' trained models on
texts that they were not trained on, nor calibrated: the translator's answers, token by token, and the perplexity of the
writer.
"""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.exact import MODELS, case_of, peers_of
from benchmarks.record import record, settle_memory
from benchmarks.subjects import AS_LOADED, PLACE, TARGETS, made, t5_small
from planish.optimizer import optimize
from planish.optimizer.fidelity.metrics import log_probabilities
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from planish.optimizer.output.lock import LOCK, Lock
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.runtime.generation import DECODER, ENCODER, FIRST, NEXT, Decoding
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.timing.interleaved import time_interleaved
from tests.train import MODELS as TRAINED
from tests.train import docstrings, pairs

PRESETS = ("fast", "small")
_OPENED = (TARGETS[0], AS_LOADED)
"""How a loader without options opens the engines."""
_BASE = "optimum export"
_TOKENS = (16, 128)
_LENGTH = 64
_UNSEEN = "[jeux]*/*.py"
"""Files whose docstrings the writer was not trained on: packages of the standard library."""
_KEEP = {"writer": ("perplexity<=1.02x",), "translator": ()}
"""Budgets that are asked for; the presets' own if none."""


def built(name: str, preset: str) -> Path:
    """Our engines of a trained model, calibrated on what it was trained on."""

    def make() -> None:
        asked = [text for text, _ in pairs(held_out=False)] if name == "translator" else docstrings()
        texts = list(itertools.islice(asked, 300))
        optimize(TRAINED / name, place, targets=TARGETS, preset=preset, keep=_KEEP[name], calibration=texts)

    place = PLACE / "ours" / f"{name}-{preset}"
    return made(place, make)


def shaped(preset: str) -> Path:
    """Our engines of T5-small's shape; its random weights lose much in few bits, so nothing is asked."""

    def make() -> None:
        optimize(t5_small(), place, targets=TARGETS, preset=preset, keep=["cosine>=0.2"])

    place = PLACE / "ours" / f"t5-small-{preset}"
    return made(place, make)


def lowered(name: str) -> Path:
    """A trained model as it was lowered."""

    def make() -> None:
        optimize(TRAINED / name, place, targets=TARGETS[:1], pipeline="")

    place = PLACE / "plain" / name / "lowered"
    return made(place, make) / "onnxruntime"


def speeds(seconds: float) -> dict[str, dict[str, float]]:
    """Label -> how many times as fast as the plain export one step of a decoder is."""
    model = MODELS["t5-small"]
    plain = peers_of(model)[_BASE][1]() / f"{NEXT}.onnx"
    figures: dict[str, dict[str, float]] = {}
    signature = Manifest.read(shaped(PRESETS[0])).signatures[NEXT].signature()
    for tokens in _TOKENS:
        case = case_of(signature, 1, tokens, behind=True)
        racing = {_BASE: EngineRef(TARGETS[0], plain)}
        for preset, target in itertools.product(PRESETS, _OPENED):
            backend = registry.backend(target)
            path = backend.path_of(NEXT, shaped(preset) / backend.name)
            racing[f"planish {preset} on {backend.name}"] = EngineRef(target, path)
        settle_memory()
        race = time_interleaved(list(racing.values()), [case] * len(racing), seconds=seconds)
        for label, own in zip(racing, race.timings(), strict=True):
            figures[f"{label}, 1 x {tokens}"] = own.__dict__
    return figures


def perplexity(target: str, folder: Path, count: int) -> float:
    """Of the writer's next token, over texts of the same length that nobody has seen."""
    backend = registry.backend(target)
    engine = backend.open(backend.path_of(DECODER, folder))
    tokenizer: Any = load_tokenizer(TRAINED / "writer")
    ids = [token for text in docstrings(_UNSEEN) for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    lost = 0.0
    for start in range(0, count * _LENGTH, _LENGTH):
        row = np.array([ids[start : start + _LENGTH]])
        scores, _ = engine.step({"input_ids": row, "attention_mask": np.ones_like(row)})
        likely = log_probabilities(scores["logits"][0, :-1])
        lost -= float(likely[np.arange(_LENGTH - 1), row[0, 1:]].sum())
    return math.exp(lost / (count * (_LENGTH - 1)))


def answers(target: str, folder: Path, count: int) -> list[list[int]]:
    """Greedy answers of a translator to questions that it was not trained on."""
    tokenizer: Any = load_tokenizer(TRAINED / "translator")
    decoding = Decoding.of(registry.backend(target), folder, (ENCODER, FIRST, NEXT))
    end = tokenizer.eos_token_id
    found: list[list[int]] = []
    for text, _ in pairs(held_out=True)[:count]:
        prompt = dict(tokenizer([text], return_tensors="np"))
        prompt.pop("token_type_ids", None)
        steps = decoding.generate(prompt, start_tokens=np.zeros((1, 1), np.int64), most=64, ends=frozenset([end]))
        found.append([int(step[0]) for step in steps])
    return found


def same_tokens(wanted: list[list[int]], found: list[list[int]]) -> float:
    """Share of the tokens of all answers that stand where they stood."""
    equal = [one == other for a, b in zip(wanted, found, strict=True) for one, other in zip(a, b, strict=False)]
    return sum(equal) / sum(map(len, wanted))


def rounded(folder: Path, target: str) -> str:
    """How many products are in which form."""
    products = Lock.read(folder / LOCK).targets[registry.backend(target).name].products
    every = {(one.component, one.product) for one in products}
    forms: dict[str, set[tuple[str, str]]] = {}
    for one in products:
        if one.rounded:
            forms.setdefault(one.text, set()).add((one.component, one.product))
    return ", ".join(f"{len(names)} of {len(every)} by {text}" for text, names in forms.items()) or "nothing"


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="Longest time for one alternation.")
@click.option("--count", default=400, show_default=True, help="Questions to the translator, and texts for the writer.")
@click.option("--keep", is_flag=True, help="Measure the engines that were built before.")
def main(seconds: float, count: int, keep: bool) -> None:
    """Weigh what decoders win in few bits against what they lose."""
    for name in () if keep else ("writer", "translator", "t5-small"):
        for preset in PRESETS:
            shutil.rmtree(PLACE / "ours" / f"{name}-{preset}", ignore_errors=True)
    rows, speed = [], speeds(seconds)
    for label, one in speed.items():
        times = f"{one['speedup']:.2f} [{one['low']:.2f}, {one['high']:.2f}] times as fast"
        rows.append(("step of T5-small's shape", label, f"{one['median_ms']:.2f} ms, {times}", ""))
    wanted = answers(TARGETS[0], lowered("translator"), count)
    truth = perplexity(TARGETS[0], lowered("writer"), count)
    kept: dict[str, dict[str, float]] = {"fp32": {"perplexity": truth}}
    for preset, target in itertools.product(PRESETS, _OPENED):
        name = registry.backend(target).name
        label = f"planish {preset} on {name}"
        found = answers(target, built("translator", preset) / name, count)
        whole = sum(one == other for one, other in zip(wanted, found, strict=True)) / count
        own = perplexity(target, built("writer", preset) / name, count)
        kept[label] = {"tokens": same_tokens(wanted, found), "answers": whole, "perplexity": own / truth}
        shown = {
            "translator": f"{kept[label]['tokens']:.2%} of tokens, {whole:.2%} of answers kept",
            "writer": f"{own / truth:.4f} times the perplexity",
        }
        rows += [(part, label, what, rounded(built(part, preset), target)) for part, what in shown.items()]
    title = f"Decoders in few bits: what they win, and what they lose on {count} texts that nobody has seen"
    record("rounded", title, ("what", "engine", "found", "in few bits"), rows, {"speed": speed, "kept": kept})


if __name__ == "__main__":
    main()
