"""What the parts of a model that writes are calibrated on: the model goes on with prompts, and each part is overheard.

A decoder that has no texts to be calibrated on writes some itself, from random first tokens (as in Liu et al. 2023,
"LLM-QAT: Data-Free Quantization Aware Training", section 3.1); of an encoder-decoder, the decoder hears what the
encoder says of the user's texts and its own answer so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import Arrays, Role, Signature
from planish.optimizer.runtime.generation import DECODER, Decoding, Sampling

_TEXTS, _TOKENS = 16, 64
"""Texts that a decoder writes, and their length."""
_STEPS = 16
"""Tokens of an answer that are overheard."""
_SAMPLING = Sampling(temperature=1.0)


class _Overheard(Engine):
    """An engine whose inputs are kept until somebody takes them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.heard: list[Arrays] = []

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.heard.append(feeds)
        return self._engine.run(feeds)


@dataclass(frozen=True)
class SelfGeneratedData:
    """The components of a model that writes, run in float as they were lowered."""

    components: Mapping[str, ir.Model]
    load: Callable[[ir.Model], Engine]

    @cached_property
    def _engines(self) -> dict[str, _Overheard]:
        return {name: _Overheard(self.load(model)) for name, model in self.components.items()}

    def texts(self, signature: Signature) -> Iterator[Arrays]:
        """Texts that a decoder writes by itself, as one prefill each."""
        ids = next(tensor for tensor in signature.inputs if tensor.role is Role.TOKENS)
        axis = signature.axes.get(PAST)
        limit = _TOKENS if axis is None or axis.maximum is None else min(_TOKENS, axis.maximum)
        rng = np.random.default_rng(0)
        decoding = Decoding(self._engines)
        for _ in range(_TEXTS):
            prompt = {"input_ids": rng.integers(0, ids.bound or 2, (1, 1))}
            written = [*prompt["input_ids"][0], *map(int, self._written(decoding, prompt, limit))]
            self._heard(DECODER)
            decoding.start({"input_ids": np.array([written], np.int64)})
            yield from self._heard(DECODER)

    def parts(self, component: str, prompts: Iterable[Arrays], start: np.ndarray) -> Iterator[Arrays]:
        """What one component of an encoder-decoder hears while prompts are answered, which all begin with ``start``,
        shape (1,)."""
        decoding = Decoding(self._engines)
        for prompt in prompts:
            rows = len(next(iter(prompt.values())))
            for _ in decoding.generate(prompt, start_tokens=np.broadcast_to(start, (rows, 1)), most=_STEPS):
                pass
            heard = {name: self._heard(name) for name in self._engines}
            yield from heard[component]

    def _written(self, decoding: Decoding, prompt: Arrays, limit: int) -> Iterator[int]:
        return (int(tokens[0]) for tokens in decoding.generate(prompt, most=limit - 1, sampling=_SAMPLING))

    def _heard(self, component: str) -> list[Arrays]:
        """What was heard since somebody asked last; the engine keeps none of it."""
        heard, self._engines[component].heard = self._engines[component].heard, []
        return heard
