"""The ecosystem's own loaders open our engine folders: `make interop`, or `make interop SAMPLE=3` for a few of them.

`build` makes engines of every architecture that generates and of some that read or see, and writes down what PyTorch
gives: greedy and beam-search tokens of a padded batch, outputs of encoders for a batch of texts or images. `check` runs
in an environment with optimum-onnx or optimum-intel, which cannot be installed beside transformers 5, and imports
nothing of ours. Loaders are given no options; OpenVINO's then compute in another precision on some processors, so what
they give is held against what `planish.json` says of that, and once more with the properties that lie beside the engine
against PyTorch. Tokens may then be other ones where PyTorch's choice was closer than what `planish.json` says of logits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NEW = 20
_BEAMS = 3
_SEEN = {"vit", "deit", "swin", "convnext", "resnet"}
_READ = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "mpnet", "deberta-v2"}
"""Encoders of images and texts that are tried; a loader has one class for each task, whatever the type."""
_CLOSE = 1e-4
_WIDER = 2
"""How much further than on the cases of the manifest an engine may stray on these, in another precision."""


def prompts(padded_left: bool) -> dict[str, list[list[int]]]:
    """A batch of two, the second of which is shorter."""
    rows = [[5, 17, 42, 8, 60, 33], [9, 71, 12, 4]]
    pads = [[3] * (6 - len(row)) for row in rows]
    ids = [pad + row if padded_left else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(pad) for pad in pads]
    mask = [zero + one if padded_left else one + zero for one, zero in zip(ones, zeros, strict=True)]
    return {"input_ids": ids, "attention_mask": mask}


def signals(*shape: int) -> list[Any]:
    """A batch of images or spectra, as nested lists."""
    import numpy as np

    made: list[Any] = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32).tolist()
    return made


def given(model: Any, batch: dict[str, list[Any]], names: list[str]) -> dict[str, list[Any]]:
    """The outputs of an encoder for a batch, as nested lists by name."""
    import torch

    with torch.inference_mode():
        outputs = model(**{name: torch.tensor(rows) for name, rows in batch.items()})
    return {name: outputs[name].tolist() for name in names}


def written(model: Any, batch: dict[str, list[Any]], beams: int) -> list[list[int]]:
    """Tokens that a model of transformers or of its loaders writes, row x place."""
    tokens: list[list[int]] = generated(model, batch, beams).tolist()
    return tokens


def generated(model: Any, batch: dict[str, list[Any]], beams: int, search: Any = None, **options: Any) -> Any:
    """What `generate`, or another search, gives with further options."""
    import torch

    feeds = {name: torch.tensor(rows) for name, rows in batch.items()}
    search = search or type(model).generate
    return search(model, **feeds, max_new_tokens=_NEW, do_sample=False, num_beams=beams, **options)


def decided(model: Any, batch: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """What PyTorch writes, for each number of beams, and what decided on it.

    That is the logits of each step (step x row x vocabulary) without beams, the mean logarithm of the probabilities of
    each row's tokens with them.
    """
    greedy = generated(model, batch, 1, return_dict_in_generate=True, output_logits=True)
    largest = max(float(step.abs().max()) for step in greedy.logits)
    return {
        "1": {
            "tokens": written(model, batch, 1),
            "logits": [step.tolist() for step in greedy.logits],
            "largest logit": largest,
        },
        str(_BEAMS): {
            "tokens": written(model, batch, _BEAMS),
            "scores": scores(model, batch, _BEAMS),
            "largest logit": largest,
        },
    }


def scores(model: Any, batch: dict[str, list[Any]], beams: int) -> list[float]:
    """Means of logarithms of probabilities, by row.

    The `generate` of Whisper would split a cache by rows, of a class that loaders do not use.
    """
    from transformers import GenerationMixin

    search = type(model).generate if "input_ids" in batch else GenerationMixin.generate
    made = generated(model, batch, beams, search, return_dict_in_generate=True, output_scores=True)
    found: list[float] = made.sequences_scores.tolist()
    return found


def sampled(names: list[str], count: int, seed: str) -> list[str]:
    """Some of the names; another seed gives others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest())[:count]


def commit() -> str:
    """The commit that is checked out; the date where there is none."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else datetime.now(UTC).date().isoformat()


def build(folder: Path, *only: str) -> None:
    """Engines and what is expected of them, in our own environment; of some model types only, if any are named.

    `--sample` and a number instead of names: so many of all, others for each commit.
    """

    from planish.optimizer import optimize
    from tests.clocks import all_faster
    from tests.zoo import GENERATORS, IMAGES, ZOO
    from tests.zoo import build as make

    images = [s for s in IMAGES if s.model_type in _SEEN and s.task == "image-classification"]
    texts = [s for s in ZOO if s.model_type in _READ]
    everything = {
        species.model_type if species in GENERATORS else species.name: species
        for species in [*GENERATORS, *texts, *images]
    }
    if only[:1] == ("--sample",):
        seed, names = commit(), list(everything)
        wanted = sampled(names, int(only[1]), seed)
        print(f"a sample by {seed}: {' '.join(wanted)}", flush=True)
    else:
        wanted = [name for name, species in everything.items() if not only or species.model_type in only]
    for name in wanted:
        species, place = everything[name], folder / name
        if (place / "expected.json").is_file():
            continue
        checkpoint = make(species, place / "checkpoint")
        expected = expectation(checkpoint, species.task)
        shutil.rmtree(place / "out", ignore_errors=True)  # of a build that was stopped
        optimize(checkpoint, place / "out", task=species.task, targets=["onnxruntime", "openvino"], clock=all_faster)
        (place / "expected.json").write_text(json.dumps(expected))
        print(f"built {place.name}", flush=True)


def expectation(checkpoint: Path, task: str) -> dict[str, Any]:
    """What PyTorch gives for a batch of what the task takes."""
    from optimum.exporters.tasks import TasksManager

    from planish.optimizer.lowering.components.tasks import TASKS, Family

    auto = TasksManager.get_model_class_for_task(task, model_class_name=TASKS[task].auto)
    model = auto.from_pretrained(checkpoint).eval()
    if TASKS[task].family is not Family.ENCODER:
        batch = generating_batch(model, task)
        return {"task": task, "batch": batch, "written": decided(model, batch)}
    batch = encoding_batch(model, task)
    return {"task": task, "batch": batch, "outputs": given(model, batch, list(TASKS[task].outputs))}


def generating_batch(model: Any, task: str) -> dict[str, list[Any]]:
    """Prompts, padded on the side that the task asks for, or recordings."""
    if task != "automatic-speech-recognition":
        return {**prompts(task == "text-generation")}
    return {model.main_input_name: signals(model.config.num_mel_bins, 2 * model.config.max_source_positions)}


def encoding_batch(model: Any, task: str) -> dict[str, list[Any]]:
    """Texts, two of which are the choices of each question where there are any, or images."""
    if model.main_input_name == "pixel_values":
        sides = model.config.image_size
        size = sides if isinstance(sides, list | tuple) else [sides] * 2
        return {"pixel_values": signals(model.config.num_channels, *size)}
    texts = prompts(padded_left=False)
    return {name: [rows, rows[::-1]] if task == "multiple-choice" else rows for name, rows in texts.items()}


_LOADERS = {
    "automatic-speech-recognition": "ModelForSpeechSeq2Seq",
    "feature-extraction": "ModelForFeatureExtraction",
    "fill-mask": "ModelForMaskedLM",
    "image-classification": "ModelForImageClassification",
    "multiple-choice": "ModelForMultipleChoice",
    "question-answering": "ModelForQuestionAnswering",
    "text-classification": "ModelForSequenceClassification",
    "text-generation": "ModelForCausalLM",
    "text2text-generation": "ModelForSeq2SeqLM",
    "token-classification": "ModelForTokenClassification",
}
"""The end of the name of the loader's class for a task."""


def loader(target: str, task: str) -> Any:
    """The loader's class for a task; None if the library has none."""
    if target == "onnxruntime":
        from optimum import onnxruntime as library
    else:
        from optimum import intel as library
    return getattr(library, {"onnxruntime": "ORT", "openvino": "OV"}[target] + _LOADERS[task], None)


def check(folder: Path, target: str) -> int:
    """Load every engine with the loader's class and compare what it gives; returns how many differ or do not load."""
    wrong = 0
    for place in sorted(path.parent for path in folder.glob("*/expected.json")):
        expected = json.loads((place / "expected.json").read_text())
        cls = loader(target, expected["task"])
        if cls is None:
            print(f"{target:12} {place.name:32} skipped: the library has no {_LOADERS[expected['task']]}", flush=True)
            continue
        for how, options, promise in ways(place / "out", target):
            try:
                model = cls.from_pretrained(place / "out" / target, **options)
                compared = compared_outputs if "outputs" in expected else compared_tokens
                said = compared(model, expected, promise)
            except Exception as error:  # noqa: BLE001 - whatever a loader of somebody else raises is told
                said = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            wrong += "OTHER" in said or "FAILED" in said
            print(f"{target:12} {place.name:32} {how:16} {said}", flush=True)
    return wrong


Way = tuple[str, dict[str, Any], dict[str, dict[str, float]] | None]


def ways(out: Path, target: str) -> list[Way]:
    """How an engine is loaded: a name, the loader's options, and what the manifest says of it (None: as PyTorch)."""
    opened = json.loads((out / "planish.json").read_text())["targets"][target]["as_loaders_open"]
    found: list[Way] = [("without options", {}, opened and opened["comparison"])]
    properties = out / target / "openvino_properties.json"
    if properties.is_file():
        found.append(("its properties", {"ov_config": json.loads(properties.read_text())}, None))
    return found


def compared_tokens(model: Any, expected: dict[str, Any], promise: dict[str, dict[str, float]] | None) -> str:
    """Whether tokens are the same, for each number of beams; other ones are right where the manifest says so."""
    return ", ".join(
        f"beams {beams}: {compared_beams(model, expected['batch'], int(beams), wanted, promise)}"
        for beams, wanted in expected["written"].items()
    )


def compared_beams(
    model: Any,
    batch: dict[str, list[Any]],
    beams: int,
    wanted: dict[str, Any],
    promise: dict[str, dict[str, float]] | None,
) -> str:
    """Whether what is written is the same; if not, how close the choice was, and how close it may have been.

    If no logit is further from PyTorch's than e, then a token that was taken in the place of PyTorch's is at most 2 e
    below it in PyTorch's logits, and means of logarithms of probabilities differ by at most 2 e.
    """
    found = written(model, batch, beams)
    if found == wanted["tokens"]:
        return "same"
    if promise is None:
        return "OTHER tokens"
    if beams == 1:
        gap = first_gap(found, wanted["tokens"], wanted["logits"])
    else:
        gap = max(abs(a - b) for a, b in zip(scores(model, batch, beams), wanted["scores"], strict=True))
    said = max(metrics["max_rel"] for name, metrics in promise.items() if name.endswith(".logits"))
    most = 2 * _WIDER * said * wanted["largest logit"]
    return f"{'differ' if gap <= most else 'OTHER tokens'} by {gap:.1e}, planish.json allows {most:.1e}"


def first_gap(found: list[list[int]], wanted: list[list[int]], logits: list[list[list[float]]]) -> float:
    """How much larger PyTorch's logits of its own tokens are than of those where each row first differs, at most."""
    begin = len(wanted[0]) - len(logits)
    gaps = [0.0]
    for row, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        pairs = list(zip(ours[begin:], theirs[begin:], strict=False))
        at = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        if at is not None:
            gaps.append(logits[at][row][pairs[at][1]] - logits[at][row][pairs[at][0]])
    return max(gaps)


def compared_outputs(model: Any, expected: dict[str, Any], promise: dict[str, dict[str, float]] | None) -> str:
    """How far outputs are from PyTorch's, relative to the largest, where the mask does not hide them."""
    import numpy as np

    wanted = {name: np.array(rows) for name, rows in expected["outputs"].items()}
    found = {name: np.array(rows) for name, rows in given(model, expected["batch"], list(wanted)).items()}
    if any(found[name].shape != wanted[name].shape for name in wanted):
        return "OTHER shapes"
    mask = np.array(expected["batch"].get("attention_mask", 1))
    error = max(
        float(np.abs(_shown(found[name] - wanted[name], mask)).max() / np.abs(wanted[name]).max()) for name in wanted
    )
    said = 0.0 if promise is None else max(metrics["max_rel"] for metrics in promise.values())
    most = max(_CLOSE, _WIDER * said)
    return (
        f"{'same' if error <= most else 'OTHER'} up to {error:.1e}{f', planish.json says {said:.1e}' if said else ''}"
    )


def _shown(differences: Any, mask: Any) -> Any:
    """Differences at positions that the mask shows, if there is one for each position of the mask."""
    if differences.shape[: mask.ndim] != mask.shape or not mask.ndim:
        return differences
    return differences * mask.reshape(mask.shape + (1,) * (differences.ndim - mask.ndim))


if __name__ == "__main__":
    action, where, *rest = sys.argv[1:]
    if action == "build":
        build(Path(where), *rest)
    else:
        sys.exit(min(1, check(Path(where), *rest)))
