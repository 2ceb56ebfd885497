"""One engine that writes, in a process of its own: python decode_turns.py KIND PATH PROMPT STEPS TARGET.

Each line on standard input is a list of texts as tokens. An empty one asks for a turn: a prompt of PROMPT tokens is
read, then STEPS tokens are written, the best one each time; milliseconds of the prompt and of one step are printed as
JSON. Otherwise the perplexity of the texts is printed, of every token but the first by the scores behind those before.
KIND is `planish`, or a peer whose package the interpreter has that runs this, `genai` (onnxruntime-genai) or `llama`
(llama-cpp-python).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Turn = Callable[[Sequence[int], int], tuple[float, float]]
Scores = Callable[[Sequence[int]], Iterator[Any]]
"""The scores behind every token of a text but the last, one step a token."""
THREADS = 2


def planish(path: str, target: str) -> tuple[Turn, Scores]:
    """Our engines, or files of the same signature."""
    from pathlib import Path

    import numpy as np

    from planish.optimizer.interfaces import registry
    from planish.optimizer.runtime.generation import DECODER, Decoding

    decoding = Decoding.of(registry.backend(target), Path(path), [DECODER])

    def turn(prompt: Sequence[int], steps: int) -> tuple[float, float]:
        ids = np.array([prompt], np.int64)
        start = time.perf_counter()
        token = decoding.start({"input_ids": ids, "attention_mask": np.ones_like(ids)}).argmax(-1)
        middle = time.perf_counter()
        for _ in range(steps):
            token = decoding.advance(token).argmax(-1)
        return middle - start, time.perf_counter() - middle

    def scores(text: Sequence[int]) -> Iterator[Any]:
        ids = np.array([text[:1]], np.int64)
        yield decoding.start({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        for token in text[1:-1]:
            yield decoding.advance(np.array([token]))[0]

    return turn, scores


def genai(path: str, _: str) -> tuple[Turn, Scores]:
    """onnxruntime-genai's own loop."""
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)

    def turn(prompt: Sequence[int], steps: int) -> tuple[float, float]:
        options = og.GeneratorParams(model)
        options.set_search_options(
            max_length=len(prompt) + steps + 1, min_length=len(prompt) + steps + 1, do_sample=False
        )
        generator = og.Generator(model, options)
        start = time.perf_counter()
        generator.append_tokens(list(prompt))
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle

    def scores(text: Sequence[int]) -> Iterator[Any]:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=len(text) + 1, do_sample=False)
        generator = og.Generator(model, options)
        for token in text[:-1]:
            generator.append_tokens([token])
            yield generator.get_logits().reshape(-1)

    return turn, scores


def llama(path: str, _: str) -> tuple[Turn, Scores]:
    """llama.cpp through its Python binding; tokens are evaluated by its C library, the best score is found by numpy."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def best() -> int:
        scores = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(scores, (model.n_vocab(),)).argmax())

    def turn(prompt: Sequence[int], steps: int) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(list(prompt))
        token = best()
        middle = time.perf_counter()
        for _ in range(steps):
            model.eval([token])
            token = best()
        return middle - start, time.perf_counter() - middle

    def scores(text: Sequence[int]) -> Iterator[Any]:
        model.reset()
        for token in text[:-1]:
            model.eval([token])
            found = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            yield np.ctypeslib.as_array(found, (model.n_vocab(),))

    return turn, scores


def perplexity(scores: Scores, texts: Sequence[Sequence[int]]) -> float:
    """exp of the mean of -log p over the tokens of all texts but their first ones."""
    import numpy as np

    lost: list[float] = []
    for text in texts:
        for token, behind in zip(text[1:], scores(text), strict=True):
            row = np.asarray(behind, np.float64)
            top = row.max()
            lost.append(top + math.log(np.exp(row - top).sum()) - row[token])
    return math.exp(sum(lost) / len(lost))


def main() -> None:
    """Answer until the input ends."""
    kind, path, length, steps, target = sys.argv[1:]
    turn, scores = {"planish": planish, "genai": genai, "llama": llama}[kind](path, target)
    prompt = [5 + 37 * place % 1000 for place in range(int(length))]
    turn(prompt, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        if texts:
            print(json.dumps(perplexity(scores, texts)), flush=True)
        else:
            read, written = turn(prompt, int(steps))
            print(json.dumps([read * 1e3, written * 1e3 / int(steps)]), flush=True)


if __name__ == "__main__":
    main()
