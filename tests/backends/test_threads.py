"""Engines are called from several threads at once: what each gets is what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.errors import BadInput
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Arrays, Program
from planish.optimizer.lowering import lower
from planish.optimizer.pipeline.presets import pipeline_text
from planish.optimizer.runtime.generation import ENCODER, FIRST, NEXT, Decoding
from tests.zoo import GENERATORS, build

TARGETS = ("onnxruntime{threads=1}", "openvino{threads=1}")
THREADS, CALLS, STEPS = 4, 80, 8


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return generator("llama", tmp_path_factory.mktemp("llama"))


def generator(name: str, folder: Path) -> Program:
    species = next(species for species in GENERATORS if species.model_type == name)
    program = lower(build(species, folder / "checkpoint")).program
    exact = Pipeline.parse(pipeline_text("exact", "onnxruntime"))
    return replace(program, components={name: exact.run(model).model for name, model in program.components.items()})


def texts() -> list[np.ndarray]:
    """Prompts of several sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(4, 90, (1 + number % 3, 2 + number % 7)) for number in range(CALLS)]


@pytest.mark.parametrize("target", TARGETS)
def test_single_calls(target: str, program: Program, tmp_path: Path) -> None:
    backend = registry.backend(target)
    backend.emit(program, tmp_path)
    engine = backend.open(tmp_path)

    def answer(ids: np.ndarray) -> np.ndarray:
        return engine.run({"input_ids": ids})["last_hidden_state"]

    same_in_threads(answer, texts())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_decoding(target: str, decoder: Program, tmp_path: Path) -> None:
    backend = registry.backend(target)
    backend.emit(decoder, tmp_path)
    engines = {"model": backend.open(tmp_path)}
    same_in_threads(lambda ids: written(Decoding(engines), {"input_ids": ids}), texts()[: CALLS // 4])


@pytest.mark.breadth
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_behind_an_encoder(target: str, tmp_path: Path) -> None:
    backend = registry.backend(target)
    (tmp_path / "out").mkdir()
    backend.emit(generator("t5", tmp_path), tmp_path / "out")
    engines = {name: backend.open(backend.path_of(name, tmp_path / "out")) for name in (ENCODER, FIRST, NEXT)}

    def answer(ids: np.ndarray) -> np.ndarray:
        return written(Decoding(engines), {"input_ids": ids}, np.zeros((len(ids), 1), np.int64))

    same_in_threads(answer, texts()[: CALLS // 4])


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_given_by_name_stays_apart(target: str, decoder: Program, tmp_path: Path) -> None:
    backend = registry.backend(target)
    backend.emit(decoder, tmp_path)
    engine = backend.open(tmp_path)
    rng = np.random.default_rng(0)
    caches = [rng.standard_normal((1, 2, 3 + number % 4, 8)).astype(np.float32) for number in range(CALLS // 4)]

    def answer(cache: np.ndarray) -> np.ndarray:
        past = {f"past_key_values.{layer}.{kind}": cache for layer in (0, 1) for kind in ("key", "value")}
        outputs = engine.run({"input_ids": np.array([[5, 6]]), **past})
        return np.concatenate([outputs["logits"].ravel(), outputs["present.1.value"].ravel()])

    same_in_threads(answer, caches)


def test_a_cache_that_a_later_step_replaced_is_refused(decoder: Program, tmp_path: Path) -> None:
    backend = registry.backend("openvino")
    backend.emit(decoder, tmp_path)
    engine = backend.open(tmp_path)
    _, first = engine.step({"input_ids": np.array([[5, 6]]), "attention_mask": np.ones((1, 2), np.int64)})
    following = {
        "input_ids": np.array([[7]]), "attention_mask": np.ones((1, 3), np.int64), "position_ids": np.array([[2]])
    }  # fmt: skip
    engine.step(following, first)
    with pytest.raises(BadInput, match="a cache is good for one step"):
        engine.step(following, first)


def written(decoding: Decoding, prompt: Arrays, start_tokens: np.ndarray | None = None) -> np.ndarray:
    """The scores of some greedy steps."""
    scores = [decoding.start(prompt, start_tokens)]
    for _ in range(STEPS):
        scores.append(decoding.advance(scores[-1].argmax(axis=-1)))
    return np.stack(scores)


def same_in_threads(answer: Callable[[np.ndarray], np.ndarray], questions: list[np.ndarray]) -> None:
    wanted = [answer(question) for question in questions]
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(answer, questions))
    for result, array in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(result, array)
