"""How the original goes on after a prompt: PyTorch, greedily, with the cache that the model itself makes."""

from __future__ import annotations

from typing import Any

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.components.calls import Tensors, accepted
from planish.optimizer.lowering.export.torch_export import to_torch
from planish.optimizer.runtime.cases import Case
from planish.optimizer.runtime.teacher_forcing import CONTINUED, GreedyContinuation, rows_at


def continue_greedily(module: Any, prompt: Case, reorder_at: int, steps: int = CONTINUED) -> GreedyContinuation:
    """The original's tokens and scores; an encoder-decoder starts with the token that its configuration names."""
    import torch

    feeds = to_torch(prompt)
    count = len(next(iter(feeds.values())))
    writer = _Pair(module, feeds) if module.config.is_encoder_decoder else _Sole(module, feeds)
    scores = [writer.first()]
    tokens = [scores[0].argmax(-1)]
    for step in range(1, steps):
        rows = torch.from_numpy(rows_at(step, reorder_at, count))
        if step == reorder_at:
            writer.select(rows)
        scores.append(writer.further(tokens[-1][rows]))
        tokens.append(scores[-1].argmax(-1))
    start = writer.start.numpy() if isinstance(writer, _Pair) else np.zeros((count, 0), np.int64)
    stacked = torch.stack(scores).float().numpy()
    return GreedyContinuation(dict(prompt), reorder_at, start, torch.stack(tokens).numpy(), stacked)


class _Sole:
    """A decoder."""

    def __init__(self, module: Any, feeds: Tensors) -> None:
        self.module = module
        self.ids = feeds["input_ids"]
        self.mask = feeds["attention_mask"]
        self.cache: Any = None

    def first(self) -> Any:
        """Scores of the token after the prompt."""
        return self._behind(self.ids)

    def further(self, tokens: Any) -> Any:
        """Scores of the token after these, shape (batch,)."""
        import torch

        column = tokens[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)
        return self._behind(column)

    def select(self, rows: Any) -> None:
        """Reorder the batch."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]

    def _behind(self, ids: Any) -> Any:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        result = self.module(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            **accepted(self.module, position_ids=positions, use_cache=True, return_dict=True),
        )
        self.cache = result.past_key_values
        return result.logits[:, -1]


class _Pair:
    """An encoder-decoder, of whatever its encoder reads."""

    def __init__(self, module: Any, feeds: Tensors) -> None:
        import torch

        settings = (module.generation_config, module.config)
        first = next((t for s in settings if (t := getattr(s, "decoder_start_token_id", None)) is not None), None)
        if first is None:
            raise BadInput("neither generation_config.json nor config.json names a decoder_start_token_id")
        self.module = module
        self.mask = feeds.get("attention_mask")
        self.states = module.get_encoder()(**feeds, return_dict=True).last_hidden_state
        self.start = torch.full((len(self.states), 1), first)
        self.cache: Any = None

    def first(self) -> Any:
        """Scores of the answer's first token."""
        return self._behind(self.start)

    def further(self, tokens: Any) -> Any:
        """Scores of the token after these, shape (batch,)."""
        return self._behind(tokens[:, None])

    def select(self, rows: Any) -> None:
        """Reorder the batch."""
        self.cache.reorder_cache(rows)
        self.states = self.states[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def _behind(self, ids: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        result = self.module(
            attention_mask=self.mask,
            decoder_input_ids=ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.cache = result.past_key_values
        return result.logits[:, -1]
