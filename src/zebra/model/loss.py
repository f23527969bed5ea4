"""The loss of a language model without its tokens x vocabulary matrix.

    loss_t = -log softmax(W h_t)[x_{t+1}]

The model's own forward runs whole, so that wrappers such as DDP see it; it is asked for no logits and for its last
hidden states, and the head is applied here, a chunk of tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORE = -100
CHUNK = 1024
_FUSED = hasattr(functional, "linear_cross_entropy")


def without_logits(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The arguments that make a model return the states that go into its head, `hidden_states[-1]`, and no logits."""
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    return {"use_cache": False, "output_hidden_states": True, "logits_to_keep": nothing}


def summed_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of all predicted tokens, in float32.

    Args:
        hidden: (B, T, hidden) states before the head.
        head: (V, hidden) the head's weight.
        labels: (B, T), the tokens themselves; `IGNORE` where a token is not to be predicted.
    """
    # With bfloat16 inputs torch 2.13 returns a wrong value (its gradients are right): float32 in, and no autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        states, targets = _shifted(hidden.float(), labels)
        return _summed(states, head.float(), targets)


def _summed(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    if _FUSED:
        # Chunks pay where there are more words than dimensions.
        options = nn.LinearCrossEntropyOptions() if head.shape[0] > head.shape[1] else None
        return functional.linear_cross_entropy(
            states, head, targets, reduction="sum", ignore_index=IGNORE, options=options
        )
    total = states.sum() * 0
    for start in range(0, len(targets), CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + checkpoint(_chunk_loss, states[chunk], head, targets[chunk], use_reentrant=False)
    return total


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, (B, T): entry `t` is that of predicting token `t`, NaN where it is not predicted."""
    with torch.autocast(hidden.device.type, enabled=False):
        states, targets = _shifted(hidden, labels)
        losses = torch.full(targets.shape, float("nan"), device=hidden.device)
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = functional.linear(states[chunk].float(), head.float())
            losses[chunk] = functional.cross_entropy(logits, targets[chunk], reduction="none", ignore_index=IGNORE)
    losses = losses.masked_fill_(targets == IGNORE, float("nan"))
    return functional.pad(losses.view(labels.shape[0], -1), (1, 0), value=float("nan"))


def _shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """States at t with the labels at t + 1, flat: (B (T - 1), hidden) and (B (T - 1))."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)


def _chunk_loss(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(
        functional.linear(states.float(), head), targets, reduction="sum", ignore_index=IGNORE
    )
