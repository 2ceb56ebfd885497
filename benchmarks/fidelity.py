"""How close our engines stay to PyTorch on inputs that nobody calibrated on: `python -m benchmarks.fidelity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import record
from benchmarks.subjects import (
    AS_LOADED,
    CHECKPOINTS,
    TARGETS,
    dynamic_int8,
    forget_ours,
    minilm,
    nncf_int8,
    our_engines,
    plain_exports,
    vnni_int8,
)
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Arrays
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from tests.sentences import sentences


def inputs(name: str, count: int) -> list[Arrays]:
    """Padded batches of two, as padding takes part in use: natural sentences, or random tokens where all is random."""
    if name == "minilm":
        tokenizer: Any = load_tokenizer(minilm())
        texts = sentences(count)
        pairs = [texts[index : index + 2] for index in range(0, len(texts), 2)]
        return [dict(tokenizer(pair, padding=True, return_tensors="np")) for pair in pairs]
    rng = np.random.default_rng(2)
    made: list[Arrays] = []
    for _ in range(0, count, 2):
        lengths = np.sort(rng.integers(8, 129, 2))[::-1]
        mask = (np.arange(lengths[0]) < lengths[:, None]).astype(np.int64)
        ids = rng.integers(5, 30_000, mask.shape) * mask
        made.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0})
    return made


def original(name: str, batches: list[Arrays]) -> list[np.ndarray]:
    """Hidden states of PyTorch in fp32: one array of (texts, tokens, width) for each batch."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(CHECKPOINTS[name]()).eval()
    with torch.inference_mode():
        feeds = [{key: torch.from_numpy(array) for key, array in batch.items()} for batch in batches]
        states: list[np.ndarray] = [model(**feed).last_hidden_state.numpy() for feed in feeds]
        return states


def engine_outputs(target: str, path: Path, batches: list[Arrays]) -> list[np.ndarray]:
    """The same from an engine."""
    engine = registry.backend(target).open(path)
    names = {tensor.name for tensor in engine.inputs}
    feeds = ({key: array for key, array in batch.items() if key in names} for batch in batches)
    return [next(iter(engine.run(feed).values())) for feed in feeds]


def embed(states: list[np.ndarray], batches: list[Arrays]) -> np.ndarray:
    """Sentence embeddings: the mean over tokens, scaled to length one (Reimers and Gurevych 2019)."""
    vectors = []
    for array, batch in zip(states, batches, strict=True):
        mask = batch["attention_mask"][:, :, None]
        vectors.append((array * mask).sum(1) / mask.sum(1))
    found = np.concatenate(vectors)
    normal: np.ndarray = found / np.linalg.norm(found, axis=1, keepdims=True)
    return normal


def nearest(vectors: np.ndarray) -> np.ndarray:
    """Index of the most similar other sentence."""
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -2)
    found: np.ndarray = likeness.argmax(axis=1)
    return found


def figures_of(states: list[np.ndarray], expected: list[np.ndarray], batches: list[Arrays]) -> dict[str, float]:
    """Largest error of a hidden state of a real token, mean cosine of sentences, agreement of nearest neighbours."""
    errors = [
        np.abs(ours - theirs)[batch["attention_mask"] == 1].max()
        for ours, theirs, batch in zip(states, expected, batches, strict=True)
    ]
    one, other = embed(states, batches), embed(expected, batches)
    return {
        "max_abs": float(max(errors)),
        "mean_cosine": float((one * other).sum(1).mean()),
        "neighbour_agreement": float((nearest(one) == nearest(other)).mean()),
    }


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(CHECKPOINTS)), help="Only this; both if none.")
@click.option("--count", default=160, show_default=True, help="How many texts.")
@click.option("--keep", is_flag=True, help="Take the engines that were built before.")
def main(models: tuple[str, ...], count: int, keep: bool) -> None:
    """Compare embeddings of texts with those of PyTorch."""
    if not keep:
        forget_ours()
    rows, figures = [], {}
    for name in models or tuple(CHECKPOINTS):
        batches = inputs(name, count)
        expected = original(name, batches)
        engines = {
            "onnxruntime's dynamic int8": (TARGETS[0], dynamic_int8(name)),
            "optimum's int8 for VNNI": (TARGETS[0], vnni_int8(name)),
            "torch.onnx.export on openvino": (AS_LOADED, plain_exports(name)["torch.onnx.export"]),
            "NNCF's static int8 on openvino": (AS_LOADED, nncf_int8(name)),
        } | our_engines(name)
        figures[name] = {
            label: figures_of(engine_outputs(target, path, batches), expected, batches)
            for label, (target, path) in engines.items()
        }
        rows += [
            (name, label, f"{f['max_abs']:.2g}", f"{f['mean_cosine']:.5f}", f"{f['neighbour_agreement']:.3f}")
            for label, f in figures[name].items()
        ]
    what = f"Against PyTorch fp32, on {count} texts: natural sentences, or random tokens where weights are random"
    columns = ("checkpoint", "engine", "max abs error", "mean sentence cosine", "nearest neighbour kept")
    record("fidelity", what, columns, rows, figures)


if __name__ == "__main__":
    main()
