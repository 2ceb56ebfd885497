"""Texts that engines write: the trained models of `tests/train.py`, token by token as PyTorch writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput
from planish.optimizer.inference.answer_files import answer_file
from planish.optimizer.inference.answer_options import AnswerOptions
from planish.optimizer.inference.requests import TextRequest
from planish.optimizer.inference.session import open_task, with_options
from planish.optimizer.inference.text_generation import TextGenerator, processors
from planish.optimizer.runtime.generation import Sampling
from tests.clocks import all_faster
from tests.conftest import Planish, once
from tests.train import MODELS, pairs

pytestmark = pytest.mark.slow

TARGETS = ("onnxruntime", "openvino")
PROMPTS = ["Return a list of", "The file is closed when", "Raise"]


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of both models for both CPU targets; nothing is timed."""

    def make(folder: Path) -> None:
        for name in ("writer", "translator"):
            optimize(MODELS / name, folder / name, targets=TARGETS, clock=all_faster)

    folder = once(tmp_path_factory, "written", make)
    return {name: folder / name for name in ("writer", "translator")}


def writer_of(folder: Path, target: str, most: int = 24, sampling: Sampling | None = None) -> TextGenerator:
    found = open_task(folder / target)
    assert isinstance(found, TextGenerator)
    return with_options(found, AnswerOptions(max_new_tokens=most, sampling=sampling or Sampling()))


def pytorch(name: str, texts: list[str], most: int) -> list[str]:
    """What transformers itself writes greedily in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    auto = AutoModelForCausalLM if name == "writer" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    tokenizer.padding_side = "left" if name == "writer" else "right"
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    feeds = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**feeds, max_new_tokens=most, do_sample=False)
    tokens = tokens[:, feeds["input_ids"].shape[1] :] if name == "writer" else tokens
    return [str(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["writer", "translator"])
def test_texts_are_those_of_pytorch(name: str, target: str, outputs: dict[str, Path]) -> None:
    texts = PROMPTS if name == "writer" else [text for text, _ in pairs(held_out=True)[:20]]
    written = writer_of(outputs[name], target, 40).answer([TextRequest(text) for text in texts])
    assert [answer["text"] for answer in written] == pytorch(name, texts, 40)


def test_the_translator_translates_what_it_has_not_seen(outputs: dict[str, Path]) -> None:
    asked = pairs(held_out=True)[:100]
    written = writer_of(outputs["translator"], "onnxruntime", 60).answer([TextRequest(text) for text, _ in asked])
    right = [answer["text"] == wanted for answer, (_, wanted) in zip(written, asked, strict=True)]
    assert np.mean(right) >= 0.95


def test_run_writes_as_it_goes(outputs: dict[str, Path], command: Planish) -> None:
    text, wanted = pairs(held_out=True)[0]
    done = command("run", outputs["translator"] / "onnxruntime", "--text", text)
    assert (done.returncode, done.stdout.strip()) == (0, wanted)
    done = command("run", outputs["writer"], "--text", PROMPTS[0], "--max-new-tokens", 12, "--json")
    assert json.loads(done.stdout) == {"text": pytorch("writer", PROMPTS[:1], 12)[0]}


def test_sampling_depends_on_its_seed_alone(outputs: dict[str, Path]) -> None:
    question = [TextRequest(PROMPTS[0])]
    texts = {
        seed: [
            writer_of(outputs["writer"], "onnxruntime", 24, Sampling(1.2, seed=seed)).answer(question)[0]["text"]
            for _ in range(2)
        ]
        for seed in (1, 2)
    }
    assert texts[1][0] == texts[1][1] != texts[2][0] == texts[2][1]


def test_a_file_of_prompts_runs_in_batches(outputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(PROMPTS))
    count = answer_file(writer_of(outputs["writer"], "openvino"), tmp_path / "in.txt", tmp_path / "out.jsonl", 2)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert count == 3
    assert [line["text"] for line in lines] == pytorch("writer", PROMPTS, 24)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "the prompt is empty"), ("word " * 300, r"tokens, the model takes 256; shorten the prompt")],
)
def test_prompts_that_cannot_be_continued(text: str, says: str, outputs: dict[str, Path], command: Planish) -> None:
    done = command("run", outputs["writer"], "--text", text)
    assert done.returncode == 3, done.stderr
    assert says in done.stderr.splitlines()[-1]
    with pytest.raises(BadInput):
        writer_of(outputs["writer"], "onnxruntime").answer([TextRequest(text)])


def test_an_answer_ends_where_the_context_does(outputs: dict[str, Path]) -> None:
    writer = writer_of(outputs["writer"], "onnxruntime", 10_000)
    prompt = "a " * 124
    length = len(writer.tokenizer(prompt)["input_ids"])
    tokens = list(writer.tokens([prompt]))
    assert 0 < len(tokens) <= 256 - length


def test_settings_of_a_checkpoint_change_the_scores() -> None:
    import torch

    settings: dict[str, Any] = {
        "repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "forced_bos_token_id": 3, "suppress_tokens": [1],
        "eos_token_id": 0, "min_length": 4, "bad_words_ids": [[2]], "forced_eos_token_id": 5,
    }  # fmt: skip
    found = {type(p).__name__.removesuffix("LogitsProcessor") for p in processors(settings, 8, 1)}
    assert found == {
        "RepetitionPenalty", "NoRepeatNGram", "ForcedBOSToken", "SuppressTokens", "MinLength", "NoBadWords",
        "ForcedEOSToken",
    }  # fmt: skip
    scores = torch.zeros(1, 6)
    (first,) = processors({"forced_bos_token_id": 3}, 8, 1)
    assert first(torch.zeros(1, 1, dtype=torch.long), scores).argmax() == 3
    assert processors({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}, 8, 1) == []
