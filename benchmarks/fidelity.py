"""How close our engines stay to PyTorch on natural sentences: `python -m benchmarks.fidelity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import record
from benchmarks.subjects import TARGETS, dynamic_int8, forget_ours, minilm, our_engines
from planish.optimizer import registry
from planish.optimizer.backend import Arrays
from planish.optimizer.lowering.tokenizer import load_tokenizer
from tests.sentences import sentences


def encode(texts: list[str]) -> list[Arrays]:
    """One padded batch of two for every two sentences: padding takes part, as it does in use."""
    tokenizer: Any = load_tokenizer(minilm())
    pairs = [texts[index : index + 2] for index in range(0, len(texts), 2)]
    return [dict(tokenizer(pair, padding=True, return_tensors="np")) for pair in pairs]


def original(batches: list[Arrays]) -> list[np.ndarray]:
    """Hidden states of PyTorch in fp32: one array of (texts, tokens, width) for each batch."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm()).eval()
    with torch.inference_mode():
        feeds = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]
        states: list[np.ndarray] = [model(**feed).last_hidden_state.numpy() for feed in feeds]
        return states


def engine_outputs(target: str, path: Path, batches: list[Arrays]) -> list[np.ndarray]:
    """The same from an engine."""
    engine = registry.backend(target).open(path)
    names = {tensor.name for tensor in engine.inputs}
    return [
        engine.run({name: array for name, array in batch.items() if name in names})["last_hidden_state"]
        for batch in batches
    ]


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
@click.option("--count", default=160, show_default=True, help="How many sentences.")
@click.option("--keep", is_flag=True, help="Take the engines that were built before.")
def main(count: int, keep: bool) -> None:
    """Compare embeddings of natural sentences with those of PyTorch."""
    if not keep:
        forget_ours()
    batches = encode(sentences(count))
    expected = original(batches)
    engines = {"onnxruntime's dynamic int8": (TARGETS[0], dynamic_int8("minilm"))} | our_engines("minilm")
    found = {
        label: figures_of(engine_outputs(target, path, batches), expected, batches)
        for label, (target, path) in engines.items()
    }
    rows = [
        (label, f"{f['max_abs']:.2g}", f"{f['mean_cosine']:.5f}", f"{f['neighbour_agreement']:.3f}")
        for label, f in found.items()
    ]
    what = f"all-MiniLM-L6-v2 against PyTorch fp32 on {count} natural sentences"
    record("fidelity", what, ("engine", "max abs error", "mean sentence cosine", "nearest neighbour kept"), rows, found)


if __name__ == "__main__":
    main()
