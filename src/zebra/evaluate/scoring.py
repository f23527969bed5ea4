"""What a model answers to prompts, and how likely given answers are; prompts of like length run together.

prompts, padded on the left          answers, padded on the right
[.. .. p0 p1 p2]  ─► cache ─► copy   [p2 a0 a1 ..]
[p0 p1 p2 p3 p4]             copy    [p4 a0 a1 a2]      for each answer a copy of the cache
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.encoding import decode
from zebra.errors import ZebraError
from zebra.evaluate.perplexity import evaluating
from zebra.generation import generate_tokens
from zebra.model.finite import checking_logits
from zebra.model.self_extend import bounded_cache

SCORES = ("generate", "likelihood")
BATCH_TOKENS = 8192
"""Tokens of prompts that run at once; a longer prompt is read in chunks of as many."""

Ids = Sequence[int]


def check_score(score: str) -> None:
    """Reject what is not in `SCORES`."""
    if score not in SCORES:
        raise ZebraError(f"the scores are {' and '.join(SCORES)}; got {score!r}. Choose one.")


def no_progress(tokens: float) -> None:
    """In place of a progress bar."""


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: Sequence[int],
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = no_progress,
) -> list[str]:
    """The greedy answer to each prompt, up to the first of the stop strings.

    Args:
        max_new_tokens: for each prompt; a batch generates as many as its largest.
        advance: takes the tokens of the prompts that are done.
    """
    answers = [""] * len(prompts)
    for batch in _batches(prompts, batch_tokens):
        ids, mask = padded([prompts[i] for i in batch], model.device, side="left")
        options: dict[str, Any] = {"max_new_tokens": max(max_new_tokens[i] for i in batch), "stop": tuple(stop)}
        if ids.shape[1] > batch_tokens:
            options["prefill_chunk"] = batch_tokens
        with evaluating(model):
            new = generate_tokens(model, tokenizer, ids, mask, **options)
        for i, text in zip(batch, (decode(tokenizer, tokens) for tokens in new), strict=True):
            answers[i] = min((text.partition(string)[0] for string in stop), key=len, default=text).strip()
        advance(int(mask.sum()))
    return answers


def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = no_progress,
) -> list[list[float]]:
    """The log-likelihood, in nats, of each answer after its prompt.

        log p(answer | prompt) = sum over its tokens of log p(token | prompt and the tokens before it)

    Args:
        prompts: each of at least one token.
        answers: for each prompt any number, each of at least one token.
        advance: takes the tokens of the prompts that are done.
    """
    sums: list[list[float]] = [[] for _ in prompts]
    for batch in _batches(prompts, batch_tokens):
        with evaluating(model), checking_logits(model):
            of_batch = _of_batch(model, [prompts[i] for i in batch], [answers[i] for i in batch], batch_tokens)
        for i, of_prompt in zip(batch, of_batch, strict=True):
            sums[i] = of_prompt
        advance(sum(len(prompts[i]) for i in batch))
    return sums


def _of_batch(
    model: PreTrainedModel, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], chunk: int
) -> list[list[float]]:
    ids, mask = padded(prompts, model.device, side="left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    before, cache = ids.shape[1] - 1, bounded_cache(model)
    cache.set_prompt_length(ids.shape[1])
    for start in range(0, before, chunk):
        end = min(start + chunk, before)
        model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    sums: list[list[float]] = [[] for _ in prompts]
    for i in range(max(map(len, answers))):
        # the i-th answer of each prompt; a prompt with fewer answers repeats its last one, which is not counted
        answer, real = padded([some[min(i, len(some) - 1)] for some in answers], model.device, side="right")
        steps = torch.arange(answer.shape[1], device=model.device)
        logits = model(
            torch.cat([ids[:, -1:], answer[:, :-1]], dim=1),
            attention_mask=torch.cat([mask, real[:, :-1]], dim=1),
            position_ids=positions[:, -1:] + steps,
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        ).logits
        of_tokens = logits.float().log_softmax(-1).gather(-1, answer[..., None])[..., 0]
        for some, of_prompt, total in zip(answers, sums, (of_tokens * real).sum(dim=1).tolist(), strict=True):
            if i < len(some):
                of_prompt.append(total)
    return sums


def padded(sequences: Sequence[Ids], device: torch.device, *, side: str) -> tuple[Tensor, Tensor]:
    """Sequences of several lengths as one tensor, padded on a side, and its mask, both (B, T)."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    padded, mask = (
        pad_sequence(tensors, batch_first=True, padding_side=side)
        for tensors in (ids, [torch.ones_like(one) for one in ids])
    )
    return padded.to(device), mask.to(device)


def _batches(prompts: Sequence[Ids], batch_tokens: int) -> list[list[int]]:
    """The indices of prompts, longest first, as many together as fit into `batch_tokens` when padded."""
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if batches and (len(batches[-1]) + 1) * len(prompts[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
