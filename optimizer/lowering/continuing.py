"""How the original goes on after a prompt: PyTorch, greedily, with the cache that the model itself makes."""

from __future__ import annotations

from typing import Any

import numpy as np

from planish.optimizer.compare import Case
from planish.optimizer.errors import BadInput
from planish.optimizer.lowering.calls import accepted
from planish.optimizer.reference import CONTINUED, Continuation, rows_at


def continue_greedily(module: Any, prompt: Case, swap: int, steps: int = CONTINUED) -> Continuation:
    """The original's tokens and scores; an encoder-decoder starts with the token that its configuration names."""
    import torch

    ids, mask = (torch.from_numpy(np.array(prompt[name])) for name in ("input_ids", "attention_mask"))
    writer = _Pair(module, ids, mask) if module.config.is_encoder_decoder else _Sole(module, ids, mask)
    scores = [writer.first()]
    tokens = [scores[0].argmax(-1)]
    for step in range(1, steps):
        rows = torch.from_numpy(rows_at(step, swap, len(ids)))
        if step == swap:
            writer.select(rows)
        scores.append(writer.further(tokens[-1][rows]))
        tokens.append(scores[-1].argmax(-1))
    start = writer.start.numpy() if isinstance(writer, _Pair) else np.zeros((len(ids), 0), np.int64)
    stacked = torch.stack(scores).float().numpy()
    return Continuation(dict(prompt), swap, start, torch.stack(tokens).numpy(), stacked)


class _Sole:
    """A decoder."""

    def __init__(self, module: Any, ids: Any, mask: Any) -> None:
        self.module = module
        self.ids = ids
        self.mask = mask
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
    """An encoder-decoder."""

    def __init__(self, module: Any, ids: Any, mask: Any) -> None:
        import torch

        first = module.config.decoder_start_token_id
        if first is None:
            raise BadInput("config.json names no decoder_start_token_id")
        self.module = module
        self.mask = mask
        self.start = torch.full((len(ids), 1), first)
        self.states = module.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
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
        self.mask, self.states = self.mask[rows], self.states[rows]

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
