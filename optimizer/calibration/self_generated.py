"""Calibration data that a generating model produces itself.

Without texts, a decoder generates some from random first tokens (as in Liu et al. 2023, "LLM-QAT: Data-Free
Quantization Aware Training", section 3.1). The decoder of an encoder-decoder is calibrated on its inputs while the
model answers the user's texts.
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
"""Number of generated texts, and their length in tokens."""
_STEPS = 16
"""Recorded decoding steps per prompt."""
_SAMPLING = Sampling(temperature=1.0)


class _Overheard(Engine):
    """An engine that records its inputs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.heard: list[Arrays] = []

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.heard.append(feeds)
        return self._engine.run(feeds)


@dataclass(frozen=True)
class SelfGeneratedData:
    """The float components of a generating model."""

    components: Mapping[str, ir.Model]
    load: Callable[[ir.Model], Engine]

    @cached_property
    def _engines(self) -> dict[str, _Overheard]:
        return {name: _Overheard(self.load(model)) for name, model in self.components.items()}

    def texts(self, signature: Signature) -> Iterator[Arrays]:
        """Texts that a decoder generates, as one prefill each."""
        ids = next(tensor for tensor in signature.inputs if tensor.role is Role.TOKENS)
        axis = signature.axes.get(PAST)
        limit = _TOKENS if axis is None or axis.maximum is None else min(_TOKENS, axis.maximum)
        rng = np.random.default_rng(0)
        decoding = Decoding(self._engines)
        for _ in range(_TEXTS):
            prompt = {"input_ids": rng.integers(0, ids.bound or 2, (1, 1))}
            written = [*prompt["input_ids"][0], *map(int, self._written(decoding, prompt, limit))]
            # Discards the inputs of the single decoding steps: calibration needs the whole text as one prefill.
            self._heard(DECODER)
            decoding.start({"input_ids": np.array([written], np.int64)})
            yield from self._heard(DECODER)

    def parts(self, component: str, prompts: Iterable[Arrays], start: np.ndarray) -> Iterator[Arrays]:
        """Inputs of one component of an encoder-decoder while it answers prompts, with first tokens ``start``, shape
        (1,)."""
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
        """Return and clear the recorded inputs."""
        heard, self._engines[component].heard = self._engines[component].heard, []
        return heard
