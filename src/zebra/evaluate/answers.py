"""The loss on answers: how well a model predicts what the assistant says.

    loss = - sum over the answers' tokens of log p(token | all before it) / number of these tokens

Conversations are packed into one sequence and do not attend to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.data.conversations import TokenizedConversation
from zebra.data.packing import IGNORE
from zebra.evaluate.batches import batches
from zebra.evaluate.perplexity import evaluating
from zebra.model.finite import check_finite
from zebra.model.loss import head_of, read_states, token_losses
from zebra.model.sequence_parallel import shard_for, whole_losses
from zebra.progress import bar


def answer_losses(
    model: PreTrainedModel, conversations: Sequence[TokenizedConversation], *, batch_tokens: int = 8192
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sum of the losses over the answers of each conversation, and their number of tokens, both (conversations,).

    Args:
        batch_tokens: tokens that are run at once; a conversation is never split.
    """
    sums, counts = np.zeros(len(conversations)), np.zeros(len(conversations), np.int64)
    lengths, head = [len(one.input_ids) for one in conversations], head_of(model)

    def fits(batch: list[int], i: int) -> bool:
        return sum(lengths[j] for j in (*batch, i)) <= batch_tokens

    with evaluating(model), bar("answers", sum(lengths), "tokens") as advance:
        for batch in batches(range(len(conversations)), fits):
            ids = torch.tensor([[token for i in batch for token in conversations[i].input_ids]], device=model.device)
            positions = torch.cat([torch.arange(lengths[i]) for i in batch])[None].to(model.device)
            in_answer = [is_answer for i in batch for is_answer in conversations[i].assistant_mask]
            answers = torch.tensor([in_answer], device=model.device)
            labels = ids.masked_fill(~answers | (positions == 0), IGNORE)
            inputs = shard_for(model, {"input_ids": ids, "position_ids": positions, "labels": labels})
            shard, targets = inputs.pop("input_ids"), inputs.pop("labels")
            states, _ = read_states(model, shard, **inputs)
            losses = whole_losses(model, token_losses(states, head, targets), ids.shape[1])[0]
            check_finite(losses[labels[0] != IGNORE], model)
            for i, part in zip(batch, losses.double().cpu().split([lengths[i] for i in batch]), strict=True):
                scored = part[~part.isnan()]
                sums[i], counts[i] = scored.sum().item(), len(scored)
            advance(ids.numel())
    return sums, counts
