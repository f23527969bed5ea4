"""The loss of a language model without its tokens x vocabulary matrix.

    loss_t = -log softmax(head(h_t))[x_{t+1}]

The model's own forward runs whole, so that wrappers such as DDP see it. It returns no logits but its last hidden
states, and the head is applied here, a chunk of tokens at a time. The auxiliary loss of a router is not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

IGNORE = -100
"""The label of a token that is not to be predicted: what torch's cross-entropy ignores by default."""
CHUNK = 512
"""Tokens whose logits are held at a time."""
_FUSED = hasattr(functional, "linear_cross_entropy")


@dataclass(frozen=True)
class Head:
    """The output head: logits over V tokens from hidden states.

        z = scale * W h + b,    logits = softcap * tanh(z / softcap) where there is a softcap

    Attributes:
        weight: W, (V, hidden).
        scale: Cohere 2 multiplies its logits, Granite divides them.
        softcap: Gemma 2 bounds them.
        bias: b, (V): Phi has one.
    """

    weight: Tensor
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """The logits (..., V) in float32 of `states` (..., hidden)."""
        logits = functional.linear(states.float(), self.weight.float()) * self.scale
        logits = logits if self.bias is None else logits + self.bias.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model of any supported family. A test compares it with the logits of transformers."""
    config, linear = model.config, model.get_output_embeddings()
    return Head(
        linear.weight,
        scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        bias=getattr(linear, "bias", None),
    )


def without_logits(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The arguments that make a model return the states that go into its head, `hidden_states[-1]`, and no logits."""
    no_positions = torch.zeros(0, dtype=torch.long, device=device)
    return {"use_cache": False, "output_hidden_states": True, "logits_to_keep": no_positions}


def summed_loss(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The sum of the losses of all predicted tokens, in float32.

    Args:
        hidden: (B, T, hidden) states before the head.
        labels: (B, T), the tokens themselves; `IGNORE` where a token is not to be predicted.

    Returns:
        A scalar, ().
    """
    # With bfloat16 inputs torch 2.13 returns a wrong value (its gradients are right): float32 in, and no autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        states, targets = _shifted(hidden, labels)
        predicted = targets != IGNORE
        if not bool(predicted.all()):  # the answer is a small part of an instruction: the head reads it alone
            states, targets = states[predicted], targets[predicted]
        if not len(targets):
            return hidden.float().sum() * 0 + head.weight.float().sum() * 0
        states, head = states.float(), replace(head, weight=head.weight.float())
        if _FUSED and head.softcap is None and head.bias is None:
            options = None
            if head.weight.shape[0] > head.weight.shape[1]:  # chunks pay where V exceeds the hidden size
                # On a CPU torch takes so few tokens at a time that its products are narrow: 32 of 2,048.
                chunk_size = CHUNK if states.device.type == "cpu" else None
                options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size)
            scaled = states if head.scale == 1 else states * head.scale
            return functional.linear_cross_entropy(scaled, head.weight, targets, reduction="sum", options=options)
        chunks = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        total: Tensor = sum(checkpoint(_chunk_loss, *chunk, head, use_reentrant=False) for chunk in chunks)
        return total


@torch.no_grad()
def token_losses(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The loss of each token, (B, T): entry `t` is that of predicting token `t`, NaN where it is not predicted.

    Args:
        hidden: (B, T, hidden). labels: (B, T).
    """
    states, targets = _shifted(hidden, labels)
    losses = _each(states, head, targets).masked_fill_(targets == IGNORE, float("nan"))
    return functional.pad(losses.view(labels.shape[0], -1), (1, 0), value=float("nan"))


@torch.no_grad()
def losses_at(hidden: Tensor, head: Head, labels: Tensor, at: Tensor) -> Tensor:
    """The losses of those tokens where `at` holds, sequence after sequence; the head is applied for no other.

    Args:
        hidden: (B, T, hidden). labels: (B, T).
        at: (B, T) bool. Nothing predicts a sequence's first token: it is False there.

    Returns:
        One entry for each True of `at`.
    """
    return _each(hidden[:, :-1][at[:, 1:]], head, labels[at])


def _each(states: Tensor, head: Head, targets: Tensor) -> Tensor:
    chunks = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
    with torch.autocast(states.device.type, enabled=False):
        return torch.cat([functional.cross_entropy(head.logits(x), y, reduction="none") for x, y in chunks])


def _shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """States at t with the labels at t + 1, flat: (B (T - 1), hidden) and (B (T - 1))."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)


def _chunk_loss(states: Tensor, targets: Tensor, head: Head) -> Tensor:
    return functional.cross_entropy(head.logits(states), targets, reduction="sum")
