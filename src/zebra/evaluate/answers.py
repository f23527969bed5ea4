"""The loss on answers: how well a model says what the assistant says, by what stands before it.

    loss = - sum over the answers' tokens of log p(token | all before it) / number of these tokens

Conversations lie side by side in one sequence and never see each other. Intervals are 95 % bootstraps over
conversations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.data.conversations import TokenizedConversation
from zebra.data.packing import IGNORE
from zebra.evaluate.intervals import bootstrap
from zebra.evaluate.perplexity import evaluating
from zebra.model.finite import check_finite
from zebra.model.loss import head_of, token_losses, without_logits
from zebra.model.sequence_parallel import shard_for, whole_losses
from zebra.progress import bar


@dataclass(frozen=True)
class AnswerScore:
    """The mean loss of the answers' tokens, in nats, with its 95 % interval, where there is more than one answer."""

    suite: str
    loss: float
    low: float | None
    high: float | None
    tokens: int
    conversations: int


def answer_score(
    suite: str, model: PreTrainedModel, conversations: Sequence[TokenizedConversation], *, seed: int = 0
) -> AnswerScore:
    """The loss on the answers of all conversations."""
    sums, counts = answer_losses(model, conversations)
    return AnswerScore(suite, *bootstrap(sums, counts, seed, bounds=(0, math.inf)), int(counts.sum()), len(sums))


def answer_losses(
    model: PreTrainedModel, conversations: Sequence[TokenizedConversation], *, batch_tokens: int = 8192
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sum of the losses of each conversation's answers, and how many tokens they have.

    Args:
        batch_tokens: how many tokens are run at once; a conversation is never split.
    """
    sums, counts = np.zeros(len(conversations)), np.zeros(len(conversations), np.int64)
    head = head_of(model)
    with evaluating(model), bar("answers", sum(len(one.input_ids) for one in conversations), "tokens") as advance:
        for first, batch in _batches(conversations, batch_tokens):
            ids = torch.tensor([[token for one in batch for token in one.input_ids]], device=model.device)
            positions = torch.cat([torch.arange(len(one.input_ids)) for one in batch])[None].to(model.device)
            answers = torch.tensor([[answer for one in batch for answer in one.assistant_mask]], device=model.device)
            labels = ids.masked_fill(~answers | (positions == 0), IGNORE)
            inputs = shard_for(model, {"input_ids": ids, "position_ids": positions, "labels": labels})
            shard, targets = inputs.pop("input_ids"), inputs.pop("labels")
            hidden = model(shard, **inputs, **without_logits(model.device)).hidden_states[-1]
            losses = whole_losses(model, token_losses(hidden, head, targets), ids.shape[1])[0]
            check_finite(losses[labels[0] != IGNORE], model)
            for i, part in enumerate(losses.double().cpu().split([len(one.input_ids) for one in batch]), start=first):
                scored = part[~part.isnan()]
                sums[i], counts[i] = scored.sum().item(), len(scored)
            advance(ids.numel())
    return sums, counts


def _batches(
    conversations: Sequence[TokenizedConversation], batch_tokens: int
) -> Iterator[tuple[int, Sequence[TokenizedConversation]]]:
    first = size = 0
    for i, one in enumerate(conversations):
        if i > first and size + len(one.input_ids) > batch_tokens:
            yield first, conversations[first:i]
            first, size = i, 0
        size += len(one.input_ids)
    yield first, conversations[first:]
