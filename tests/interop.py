"""The ecosystem's own loaders open our engine folders: `make interop`.

`build` makes engines of every architecture that generates, and writes down what PyTorch gives: greedy and beam-search
tokens of a padded batch. `check` runs in an environment with optimum-onnx or optimum-intel, which cannot be installed
beside transformers 5, and imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_NEW = 20
_BEAMS = 3
_OPTIONS: dict[str, dict[str, Any]] = {
    "onnxruntime": {},
    "openvino": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
}
"""OpenVINO computes in bf16 on processors that have it unless told otherwise."""


def prompts(padded_left: bool) -> dict[str, list[list[int]]]:
    """A batch of two, the second of which is shorter."""
    rows = [[5, 17, 42, 8, 60, 33], [9, 71, 12, 4]]
    pads = [[3] * (6 - len(row)) for row in rows]
    ids = [pad + row if padded_left else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(pad) for pad in pads]
    mask = [zero + one if padded_left else one + zero for one, zero in zip(ones, zeros, strict=True)]
    return {"input_ids": ids, "attention_mask": mask}


def written(model: Any, batch: dict[str, list[list[int]]], beams: int) -> list[list[int]]:
    """Tokens that a model of transformers or of its loaders writes."""
    import torch

    feeds = {name: torch.tensor(rows) for name, rows in batch.items()}
    tokens = model.generate(**feeds, max_new_tokens=_NEW, do_sample=False, num_beams=beams)
    return [[int(token) for token in row] for row in tokens]


def build(folder: Path) -> None:
    """Engines and what is expected of them, in our own environment."""
    from unittest import mock

    from optimum.exporters.tasks import TasksManager

    from planish.optimizer import optimize
    from planish.optimizer.measure import Timing
    from tests.zoo import GENERATORS
    from tests.zoo import build as make

    faster = [Timing(1, 1, 1, 1, 1), Timing(1, 2, 2, 2, 1)]
    for species in GENERATORS:
        place = folder / species.model_type
        if (place / "expected.json").is_file():
            continue
        checkpoint = make(species, place / "checkpoint")
        model = TasksManager.get_model_class_for_task(species.task).from_pretrained(checkpoint).eval()
        batch = prompts(species.task == "text-generation")
        tokens = {str(beams): written(model, batch, beams) for beams in (1, _BEAMS)}
        with mock.patch("planish.optimizer.building.race", lambda *_: faster):
            optimize(checkpoint, place / "out", task=species.task, targets=["onnxruntime", "openvino"])
        expected = {"task": species.task, "batch": batch, "tokens": tokens}
        (place / "expected.json").write_text(json.dumps(expected))
        print(f"built {species.model_type}", flush=True)


def loader(target: str, task: str) -> Any:
    """The loader's class for a task."""
    if target == "onnxruntime":
        from optimum import onnxruntime as library

        return library.ORTModelForCausalLM if task == "text-generation" else library.ORTModelForSeq2SeqLM
    from optimum import intel

    return intel.OVModelForCausalLM if task == "text-generation" else intel.OVModelForSeq2SeqLM


def check(folder: Path, target: str) -> int:
    """Load every engine with the loader's class and compare its tokens; returns how many differ or do not load."""
    wrong = 0
    for place in sorted(path.parent for path in folder.glob("*/expected.json")):
        expected = json.loads((place / "expected.json").read_text())
        try:
            model = loader(target, expected["task"]).from_pretrained(place / "out" / target, **_OPTIONS[target])
            found = {beams: written(model, expected["batch"], int(beams)) for beams in expected["tokens"]}
            said = " ".join(f"beams {b}: {'same' if found[b] == t else 'OTHER'}" for b, t in expected["tokens"].items())
        except Exception as error:  # noqa: BLE001 - whatever a loader of somebody else raises is told
            said = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        wrong += "OTHER" in said or "FAILED" in said
        print(f"{target:12} {place.name:10} {said}", flush=True)
    return wrong


if __name__ == "__main__":
    action, where, *rest = sys.argv[1:]
    if action == "build":
        build(Path(where))
    else:
        sys.exit(min(1, check(Path(where), *rest)))
