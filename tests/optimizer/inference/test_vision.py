"""Images and speech: `.npz` files of arrays in, answers that are PyTorch's, one clear line for what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.inputs import make_inputs, make_prompts
from planish.optimizer.inference.answer_files import answer_file
from planish.optimizer.inference.answer_options import AnswerOptions
from planish.optimizer.inference.session import open_task, with_options
from planish.optimizer.inference.speech import SpeechTranscriber, forced_tokens
from planish.optimizer.inference.text_generation import best_of
from planish.optimizer.inference.vision import ImageTasks
from planish.optimizer.ir.program import Axis, Role
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.checkpoint.sequence_limits import limit_axes
from planish.optimizer.lowering.components.tasks import TASKS
from tests.clocks import all_equal, all_faster
from tests.conftest import Planish, once, with_tokenizer
from tests.zoo import GENERATORS, IMAGES, Species, build

pytestmark = pytest.mark.slow

TARGETS = ("onnxruntime", "openvino")
WHISPER = next(species for species in GENERATORS if species.model_type == "whisper")
PROCESSOR = '{"do_center_crop": true, "crop_size": {"height": 40, "width": 32}, "size": {"shortest_edge": 48}}'


def seen(name: str) -> Species:
    return next(species for species in IMAGES if species.name == name)


def made(species: Species, folder: Path, *, tokenizer: bool = False) -> Path:
    """Engines for both CPU targets; nothing is timed."""
    checkpoint = build(species, folder / "checkpoint")
    (checkpoint / "preprocessor_config.json").write_text(PROCESSOR)
    if tokenizer:
        with_tokenizer(checkpoint)
    optimize(checkpoint, folder / "out", targets=TARGETS, clock=all_faster)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "vit", lambda folder: made(seen("vit-image-classification"), folder))


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "whisper", lambda folder: made(WHISPER, folder))


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def file_of(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "in.npz", **arrays)  # type: ignore[arg-type]
    return folder / "in.npz"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pytorch(checkpoint: Path, task: str) -> Any:
    from optimum.exporters.tasks import TasksManager

    auto = TasksManager.get_model_class_for_task(task, model_class_name=TASKS[task].auto)
    return auto.from_pretrained(checkpoint).eval()


def test_labels_of_images(vit: Path, tmp_path: Path) -> None:
    import torch

    pixels = drawn(5, 3, 30, 24)
    task = open_task(vit / "out")
    assert isinstance(task, ImageTasks)
    assert (vit / "out" / "openvino" / "preprocessor_config.json").read_text() == PROCESSOR
    count = answer_file(task, file_of(tmp_path, pixel_values=pixels), tmp_path / "out.jsonl", batch=2)
    with torch.inference_mode():
        scores = pytorch(vit / "checkpoint", "image-classification")(torch.from_numpy(pixels)).logits.softmax(-1)
    found = lines(tmp_path / "out.jsonl")
    assert (count, [line["index"] for line in found]) == (5, list(range(5)))
    for line, row in zip(found, scores, strict=True):
        assert line["label"] == f"LABEL_{int(row.argmax())}"
        assert [line["scores"][f"LABEL_{index}"] for index in range(3)] == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["vit-feature-extraction", "convnext-feature-extraction"])
def test_embeddings_of_images_are_the_mean_over_their_places(name: str, tmp_path: Path) -> None:
    import torch

    folder = made(seen(name), tmp_path)
    pixels = drawn(2, 3, 30, 24) if name.startswith("vit") else drawn(2, 3, 40, 40)
    task = open_task(folder / "out" / "openvino")
    answer_file(task, file_of(tmp_path, pixel_values=pixels), tmp_path / "out.jsonl")
    with torch.inference_mode():
        hidden = pytorch(folder / "checkpoint", "feature-extraction")(torch.from_numpy(pixels)).last_hidden_state
    wanted = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
    np.testing.assert_allclose([line["embedding"] for line in lines(tmp_path / "out.jsonl")], wanted, atol=1e-5)


Change = Callable[[np.ndarray], np.ndarray]
MISFITS: Mapping[str, tuple[Change, str]] = {
    "another size": (lambda a: a[..., :20], "has shape [2, 3, 30, 20], the model takes [batch, 3, 30, 24]"),
    "channels last": (lambda a: a.transpose(0, 2, 3, 1), "has shape [2, 30, 24, 3], the model takes"),
    "one image without a batch": (lambda a: a[0], "has shape [3, 30, 24], the model takes"),
    "raw pixels": (lambda a: (a * 255).astype(np.uint8), "'pixel_values' is uint8, not float32; give what the"),
    "not numbers": (lambda a: a + np.inf, "holds NaN or infinity"),
    "no image": (lambda a: a[:0], "has 0 along 'batch', which does not fit"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arrays_that_do_not_fit(name: str, vit: Path, tmp_path: Path, command: Planish) -> None:
    change, says = MISFITS[name]
    source = file_of(tmp_path, pixel_values=change(drawn(2, 3, 30, 24)))
    done = command("run", vit / "out", "--input", source, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 3, done.stderr
    assert says in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("planish: error: ")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in.npz"}


def test_engines_take_what_they_are_made_for(
    vit: Path, whisper: Path, tiny: Path, tmp_path: Path, command: Planish
) -> None:
    for folder, name in ((vit, "pixel_values"), (whisper, "input_features")):
        done = command("run", folder / "out", "--text", "a cat")
        assert done.returncode == 2
        assert f"this engine takes {name}, not texts; give --input" in done.stderr.splitlines()[-1]
        (tmp_path / "in.txt").write_text("a cat\n")
        done = command("run", folder / "out", "--input", tmp_path / "in.txt", "--output", tmp_path / "no.jsonl")
        assert (done.returncode, f"takes {name}, not texts" in done.stderr) == (3, True), done.stderr
    task = open_task(vit / "out")
    with pytest.raises(BadInput, match="it has no array 'pixel_values'; it has \\['input_ids'\\]"):
        list(task.requests(file_of(tmp_path, input_ids=np.ones((1, 4)))))
    assert not (tmp_path / "no.jsonl").exists()
    optimize(tiny, tmp_path / "text", clock=all_equal)
    with pytest.raises(BadInput, match="takes texts, not arrays"):
        list(open_task(tmp_path / "text").requests(file_of(tmp_path, input_ids=np.ones((1, 4)))))


def greedy(checkpoint: Path, features: np.ndarray, begin: list[int], most: int) -> list[list[int]]:
    """Tokens that PyTorch gives behind the tokens that an answer begins with, until its end; by plain calls."""
    import torch

    model = pytorch(checkpoint, "automatic-speech-recognition")
    found = []
    for row in features:
        ids = list(begin)
        with torch.inference_mode():
            while len(ids) < len(begin) + most:
                scores = model(torch.from_numpy(row[None]), decoder_input_ids=torch.tensor([ids])).logits[0, -1]
                ids.append(int(scores.argmax()))
        rest = ids[1:]
        end = model.config.eos_token_id
        found.append(rest[: rest.index(end)] if end in rest else rest)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_tokens_of_recordings(target: str, whisper: Path, tmp_path: Path) -> None:
    features = drawn(3, 10, 26)
    task = open_task(whisper / "out" / target)
    assert isinstance(task, SpeechTranscriber)
    task = with_options(task, AnswerOptions(max_new_tokens=12))
    answer_file(task, file_of(tmp_path, input_features=features), tmp_path / "out.jsonl", batch=2)
    wanted = greedy(whisper / "checkpoint", features, [2], 12)
    assert [line["tokens"] for line in lines(tmp_path / "out.jsonl")] == wanted
    assert len({tuple(row) for row in wanted}) > 1


def test_answers_begin_as_the_checkpoint_says_and_end_where_its_table_does(whisper: Path) -> None:
    task = open_task(whisper / "out" / "onnxruntime")
    assert isinstance(task, SpeechTranscriber)
    task.settings = {
        **task.settings, "lang_to_id": {"<|en|>": 7, "<|de|>": 9}, "task_to_id": {"transcribe": 11},
        "task": "transcribe", "no_timestamps_token_id": 13, "suppress_tokens": [7, 9, 11, 13], "eos_token_id": 98,
    }  # fmt: skip
    assert with_options(task, AnswerOptions()).max_new_tokens == 48
    prompt = {"input_features": drawn(2, 10, 26)}
    tokens = np.stack(list(with_options(task, AnswerOptions(max_new_tokens=500)).generate(prompt)), axis=1)
    scores = task.decoding.start(prompt, np.full((2, 1), 2))
    assert tokens[:, 0].tolist() == np.where(scores[:, 7] >= scores[:, 9], 7, 9).tolist()
    assert tokens[:, 1:3].tolist() == [[11, 13]] * 2
    assert not np.isin(tokens[:, 3:], [7, 9, 11, 13]).any()
    assert tokens.shape[1] <= 48


@pytest.mark.breadth
def test_a_recording_becomes_text_where_there_is_a_tokenizer(tmp_path: Path, command: Planish) -> None:
    folder = made(WHISPER, tmp_path, tokenizer=True)
    features = drawn(2, 10, 26)
    source = file_of(tmp_path, input_features=features)
    options = ["--input", source, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 9]
    done = command("run", folder / "out", *options)
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    wanted = [
        tokenizer.decode(row, skip_special_tokens=True) for row in greedy(folder / "checkpoint", features, [2], 9)
    ]
    assert [line["text"] for line in lines(tmp_path / "out.jsonl")] == wanted


LANGUAGES = {"lang_to_id": {"<|en|>": 7, "<|de|>": 9}, "task_to_id": {"transcribe": 11, "translate": 12}}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, []),
        ({"no_timestamps_token_id": 13}, [[13]]),
        ({**LANGUAGES, "no_timestamps_token_id": 13}, [[7, 9], [13]]),
        ({**LANGUAGES, "language": "german", "no_timestamps_token_id": 13}, [[9], [11], [13]]),
        ({**LANGUAGES, "language": "en", "task": "translate"}, [[7], [12]]),
        ({**LANGUAGES, "task": "translate"}, [[7, 9], [12]]),
        ({**LANGUAGES, "forced_decoder_ids": [[1, None], [2, 11]], "no_timestamps_token_id": 13}, [[7, 9], [11], [13]]),
        ({"forced_decoder_ids": [[1, 7], [2, 11], [3, 13]], "no_timestamps_token_id": 13}, [[7], [11], [13]]),
        ({"forced_decoder_ids": [[1, None], [2, 11]]}, [[11]]),
    ],
)
def test_forced_tokens(settings: dict[str, Any], wanted: list[list[int]], whisper: Path) -> None:
    assert forced_tokens(settings) == wanted
    if any(len(tokens) > 1 for tokens in wanted) or not wanted:
        return
    import torch
    from transformers import GenerationConfig

    model = pytorch(whisper / "checkpoint", "automatic-speech-recognition")
    config = GenerationConfig(**{"decoder_start_token_id": 2, "return_timestamps": False, **settings})
    ids = model._retrieve_init_tokens(torch.zeros(1, 10, 26), 1, config, model.config, 26, {})
    assert ids.tolist() == [[2, *(tokens[0] for tokens in wanted)]]


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(BadInput, match=r"asks for the language '<\|fr\|>', which is not among its <\|en\|>, <\|de\|>"):
        forced_tokens({**LANGUAGES, "language": "french"})


def test_the_likeliest_of_several() -> None:
    scores = np.array([[5, 1, 2, 3], [5, 3, 1, 2]], np.float32)
    assert best_of(scores, [1, 2]).argmax(axis=1).tolist() == [2, 1]
    assert np.isneginf(best_of(scores, [1, 2])).sum() == 6


def test_made_images_and_recordings(whisper: Path, vit: Path) -> None:
    image = lower(vit / "checkpoint").program.sole()[1]
    cases = make_inputs(image)
    assert [case["pixel_values"].shape for case in cases] == [(3, 3, 30, 24), (1, 3, 30, 24)]
    assert cases[0]["pixel_values"].dtype == np.float32
    assert image.input("pixel_values").role is Role.PIXELS
    assert all(
        np.array_equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(cases, make_inputs(image), strict=True)
    )
    program = lower(whisper / "checkpoint").program
    prompts = make_prompts(program.signatures["encoder_model"])
    shapes = [prompt["input_features"].shape for prompt, _ in prompts]
    assert shapes == [(3, 10, 26), (1, 10, 26)]
    silent = (prompts[0][0]["input_features"] == -1).all(axis=1).sum(axis=1)
    assert silent.tolist() == [0, 6, 11]
    assert program.signatures["decoder_model"].axes["sequence"].maximum == 48


def configured(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_size_of_images(tmp_path: Path) -> None:
    """A convolutional network without a size of its own takes what its processor makes."""
    species = seen("resnet-image-classification")
    sizes = {name: value for name, value in species.config.items() if name != "image_size"}
    checkpoint = build(Species("resnet", species.task, sizes), tmp_path / "c")
    with pytest.raises(BadInput, match=r"neither config.json nor preprocessor_config.json tells the size"):
        lower(checkpoint)
    for settings, size in (
        (PROCESSOR, (40, 32)),
        ('{"size": {"height": 50, "width": 42}, "do_center_crop": false, "crop_size": 9}', (50, 42)),
        ('{"size": 44}', (44, 44)),
        ('{"size": {"shortest_edge": 36}}', (36, 36)),
    ):
        (checkpoint / "preprocessor_config.json").write_text(settings)
        assert lower(checkpoint).program.sole()[1].inputs[0].shape == ("batch", 3, *size)
    (checkpoint / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadInput, match="this is not JSON"):
        lower(checkpoint)


def test_what_sees_and_reads_is_no_encoder_of_images(tmp_path: Path) -> None:
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    sizes = {"text_config": {**text, "vocab_size": 99}, "vision_config": {**text, "image_size": 30, "patch_size": 6}}
    checkpoint = build(Species("clip", "feature-extraction", sizes), tmp_path / "c")
    with pytest.raises(BadInput, match="CLIPModel"):
        lower(checkpoint)


def test_spectra_of_another_kind_are_refused(tmp_path: Path) -> None:
    sizes = {
        **WHISPER.config,
        "input_feat_per_channel": 10,
        "input_channels": 1,
        "conv_channels": 12,
        "num_mel_bins": ...,
    }
    checkpoint = build(Species("speech_to_text", WHISPER.task, sizes), tmp_path / "c")
    with pytest.raises(BadInput, match="Speech2TextForConditionalGeneration"):
        lower(checkpoint)


def test_positions_of_a_decoder_that_hears_are_limited(whisper: Path) -> None:
    from planish.optimizer.lowering.checkpoint.checkpoint import open_checkpoint, skeleton

    checkpoint = open_checkpoint(configured(whisper / "checkpoint", max_target_positions=48))
    found = limit_axes({"past": Axis("past", 0), "batch": Axis("batch")}, skeleton(checkpoint), checkpoint)
    assert (found["past"].maximum, found["batch"].maximum) == (47, None)
