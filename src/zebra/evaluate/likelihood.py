"""How likely answers are behind their prompts, read once each, a chunk at a time.

prompts, padded on the left          answers, padded on the right
[.. .. p0 p1 p2]  ─► cache ─► copy   [p2 a0 a1 ..]
[p0 p1 p2 p3 p4]             copy    [p4 a0 a1 a2]      for each answer a copy of the cache
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from zebra.model.self_extend import bounded_cache

BATCH_TOKENS = 8192
"""Tokens of prompt that are run at once; a longer prompt is read in chunks of as many."""

Ids = Sequence[int]


def padded(rows: Sequence[Ids], device: torch.device, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one tensor, and where its tokens are, both (B, T)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    there = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), there.to(device)


def likelihoods(
    model: PreTrainedModel, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], chunk: int = BATCH_TOKENS
) -> list[list[float]]:
    """The log-likelihood, in nats, of each answer behind its prompt.

        log p(answer | prompt) = sum over its tokens of log p(token | prompt and the tokens before it)

    Args:
        prompts: each of at least one token.
        answers: for each prompt as many as there are, each of at least one token.
        chunk: tokens of the prompts that are read at a time.
    """
    ids, there = padded(prompts, model.device, side="left")
    places = (there.cumsum(1) - 1).clamp(min=0)
    before, cache = ids.shape[1] - 1, bounded_cache(model)
    cache.set_prompt_length(ids.shape[1])
    for start in range(0, before, chunk):
        end = min(start + chunk, before)
        model(
            ids[:, start:end],
            attention_mask=there[:, :end],
            position_ids=places[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    found: list[list[float]] = [[] for _ in prompts]
    for i in range(max(map(len, answers))):
        turn, real = padded([own[min(i, len(own) - 1)] for own in answers], model.device, side="right")
        steps = torch.arange(turn.shape[1], device=model.device)
        logits = model(
            torch.cat([ids[:, -1:], turn[:, :-1]], dim=1),
            attention_mask=torch.cat([there, real[:, :-1]], dim=1),
            position_ids=places[:, -1:] + steps,
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        ).logits
        chances = logits.float().log_softmax(-1).gather(-1, turn[..., None])[..., 0]
        sums = (chances * real).sum(dim=1).tolist()
        for own, row, total in zip(answers, found, sums, strict=True):
            if i < len(own):
                row.append(total)
    return found
