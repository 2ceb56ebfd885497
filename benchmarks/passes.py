"""Seconds that pipelines take by themselves, over the number of nodes: `python -m benchmarks.passes`.

BERT-base as lowered, and deep stacks of narrow layers, to see that time grows with the nodes and not faster. Only the
passes run: nothing is compared, as `planish opt --no-check` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import click
import onnx_ir as ir

from benchmarks.record import record
from benchmarks.subjects import PLACE, TARGETS, bert_base
from planish.optimizer import Pipeline
from planish.optimizer.lowering import lower

_LAYERS = (20, 41, 82, 165)
"""The largest has nearly 10,000 nodes."""
_PRESETS = ("exact", "fast")


def deep(layers: int) -> Path:
    """A BERT checkpoint of many layers, 32 wide, with random weights."""
    folder = PLACE / f"deep-{layers}"
    if not folder.exists():
        import torch
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
        config = BertConfig(**sizes, num_hidden_layers=layers, architectures=["BertModel"])
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def _subjects() -> Iterator[tuple[str, ir.Model]]:
    yield "BERT-base", lower(bert_base()).program.sole()[0]
    for layers in _LAYERS:
        yield f"{layers} narrow layers", lower(deep(layers)).program.sole()[0]


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Run the pipelines of both presets over graphs of growing size."""
    rows, figures = [], {}
    for subject, model in _subjects():
        nodes = sum(1 for _ in model.graph.all_nodes())
        for target in (text.partition("{")[0] for text in TARGETS):
            for preset in _PRESETS:
                pipeline = Pipeline.preset(preset, target)
                seconds = []
                for _ in range(rounds):
                    copy = model.clone()
                    start = time.perf_counter()
                    pipeline.run(copy)
                    seconds.append(time.perf_counter() - start)
                median = statistics.median(seconds)
                rows.append(
                    (subject, str(nodes), f"{preset} for {target}", f"{median:.2f}", f"{median / nodes * 1e3:.2f}")
                )
                figures[f"{subject}, {preset}, {target}"] = {"nodes": nodes, "seconds": seconds}
    what = f"Passes alone, nothing compared: median of {rounds} runs"
    record("passes", what, ("graph", "nodes", "pipeline", "seconds", "ms a node"), rows, figures)


if __name__ == "__main__":
    main()
