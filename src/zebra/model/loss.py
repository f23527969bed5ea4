"""The loss of a language model without the logits (tokens x vocabulary) of all tokens at once.

    loss_t = -log softmax(head(h_t))[x_{t+1}]

The model's own forward runs whole, so that wrappers such as DDP work. It returns its last hidden states and no logits,
and the head is applied here, to a chunk of tokens at a time. A router's auxiliary loss is not included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from zebra.data.packing import IGNORE
from zebra.errors import ZebraError

CHUNK = 512
"""Tokens whose logits are in memory at a time."""
_FUSED = hasattr(functional, "linear_cross_entropy")


@dataclass(frozen=True)
class Head:
    """The output head: logits over V tokens from hidden states.

        z = scale * module(h),    logits = softcap * tanh(z / softcap) where there is a softcap

    The module is called as the model calls it, with what peft, a quantiser, hooks or torch's parametrizations have
    changed in it. Only an unchanged linear module is replaced by its weight, in torch's fused kernel.

    Attributes:
        module: from hidden states to V logits, such as W h or, in Phi, W h + b.
        scale: Cohere 2 multiplies its logits, Granite divides them.
        softcap: Gemma 2 bounds them.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """The float32 logits (..., V) of `states` (..., hidden)."""
        return self._logits(states, self._float32_parameters())

    def check(self, states: Tensor, logits: Tensor) -> None:
        """Check that the head gives the model's own logits (..., V) for the same states (..., hidden).

        Raises:
            ZebraError: it does not, because the model's class changes its logits in another way.
        """
        expected, scale = logits.float(), logits.abs().max().float()
        # Mixed precision of a trainer returns in float32 what was computed in 16 bits.
        rounded = any(torch.equal(expected.to(dtype).float(), expected) for dtype in (torch.bfloat16, torch.float16))
        if (self.logits(states) - expected).abs().max() > (0.05 if rounded else 1e-3) * scale:
            raise ZebraError(
                "this model's class does more than scale and cap the logits of its head, so its loss cannot be "
                "computed in chunks. Evaluate it with `zebra evaluate tasks`."
            )

    @torch.no_grad()
    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """The float32 loss, (n,), of each of the states (n, hidden) that predict the tokens `targets` (n).

        At targets that are `IGNORE` the value means nothing.
        """
        parameters, weight = self._float32_parameters(), self._plain_weight()
        are_exact = {states.dtype, *(one.dtype for one in self.module.parameters())} == {torch.bfloat16}
        losses = [states.new_empty(0, dtype=torch.float32)]
        products: Tensor | None = None
        with products_of_bfloat16(are_exact):
            for x, y in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
                if weight is None:
                    logits = self._logits(x, parameters)
                else:  # into the memory of the last chunk: a CPU takes as long to get new memory as to fill it
                    out = None if products is None else products[: len(x)]
                    products = torch.mm(x.float(), parameters.get("weight", weight).mT, out=out)
                    logits = self._scaled(products)
                losses.append(_overwriting_loss(logits, y))
        return torch.cat(losses)

    def summed_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The sum, (), of the losses of states (n, hidden) that predict the tokens `targets` (n)."""
        states, weight = states.float(), self._plain_weight()
        if _FUSED and weight is not None and self.softcap is None:
            options = None
            if weight.shape[0] > weight.shape[1]:  # chunks pay where V exceeds the hidden size
                # On a CPU torch's own chunks are so small that its products are narrow: 32 tokens of 2,048.
                chunk_size = CHUNK if states.device.type == "cpu" else None
                options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size)
            scaled = states if self.scale == 1 else states * self.scale
            return functional.linear_cross_entropy(scaled, weight.float(), targets, reduction="sum", options=options)
        parameters = self._float32_parameters()

        def chunk_loss(states: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(self._logits(states, parameters), targets, reduction="sum")

        chunks = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        total: Tensor = sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
        return total

    def _logits(self, states: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self._scaled(functional_call(self.module, parameters, (states.float(),)).float())

    def _scaled(self, logits: Tensor) -> Tensor:
        """The logits from the module's output."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _float32_parameters(self) -> dict[str, Tensor]:
        """Its parameters of other floating-point dtypes as float32, by name; quantised ones are left as they are."""
        others = (torch.float64, torch.bfloat16, torch.float16)
        return {name: one.float() for name, one in self.module.named_parameters() if one.dtype in others}

    def _plain_weight(self) -> Tensor | None:
        """W, (V, hidden), where the module computes W h and nothing else; else None."""
        module = self.module
        changed = "forward" in vars(module) or any(hooks for name, hooks in vars(module).items() if "_hooks" in name)
        is_plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.bias is None
        return module.weight if is_plain and not changed else None  # type: ignore[return-value]


@contextmanager
def products_of_bfloat16(are_bfloat16: bool = True) -> Iterator[None]:
    """Let the CPU multiply float32 by its bfloat16 instructions, if it has them; sums stay float32.

    Operands are rounded to bfloat16, which changes nothing in values that were bfloat16 before.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16" if are_bfloat16 else before
    try:
        yield
    finally:
        products.fp32_precision = before


def _overwriting_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(z)[target] of logits z (n, V), which are overwritten: (n,)."""
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])
    largest = logits.amax(1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return (sums.log_() + largest - chosen)[:, 0]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model of any supported family, with everything that wraps it."""
    config = model.config
    return Head(
        model.get_output_embeddings(),
        scale=(getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def without_logits(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The arguments that make a model return the input of its head, `hidden_states[-1]`, and no logits."""
    return {"use_cache": False, "output_hidden_states": True, "logits_to_keep": _no_positions(device)}


def read_states(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Run a model; return the input of its head, (B, T, hidden), and the logits at `logits_to_keep`, by default none.

    For measurements: `output_hidden_states` would keep those of all layers, 17 GiB in an 8B model for 65,536 tokens.

    Args:
        ids: (B, T).
        kwargs: further arguments of the model's forward.
    """
    states: list[Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    with model.get_decoder().register_forward_hook(record):
        outputs = model(ids, **({"use_cache": False, "logits_to_keep": _no_positions(model.device)} | kwargs))
    return states[0], outputs.logits


def _no_positions(device: torch.device | str) -> Tensor:
    return torch.zeros(0, dtype=torch.long, device=device)


def summed_loss(hidden: Tensor, head: Head, labels: Tensor, *, mixed_precision: bool = False) -> Tensor:
    """The sum of the losses of all predicted tokens, in float32.

    Args:
        hidden: (B, T, hidden) states before the head.
        labels: (B, T), the tokens themselves, or `IGNORE` for a token that is not to be predicted. Or (B, T + 1), with
            the token after the T, which is then predicted too.
        mixed_precision: let a CPU round the operands of the head's products to bfloat16, as those of the other layers.

    Returns:
        A scalar, ().
    """
    # With bfloat16 inputs torch 2.13 returns a wrong value (its gradients are right): float32 in, and no autocast.
    with torch.autocast(hidden.device.type, enabled=False), products_of_bfloat16(mixed_precision):
        states, targets = _shifted(hidden, labels)
        predicted = targets != IGNORE
        if not bool(predicted.all()):  # an answer is a small part of an instruction: the head runs on it only
            states, targets = states[predicted], targets[predicted]
        if not len(targets):
            return hidden.float().sum() * 0 + sum(
                one.float().sum() * 0 for one in head.module.parameters() if one.requires_grad
            )
        return head.summed_loss(states, targets)


@torch.no_grad()
def token_losses(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The loss of each token, shaped like `labels`: entry `t` is for predicting token `t`, NaN if it is not predicted.

    Args:
        hidden: (B, T, hidden). labels: (B, T), or (B, T + 1) as in `summed_loss`.
    """
    states, targets = _shifted(hidden, labels)
    losses = _each(states, head, targets).masked_fill_(targets == IGNORE, float("nan"))
    return functional.pad(losses.view(labels.shape[0], -1), (1, 0), value=float("nan"))


@torch.no_grad()
def losses_at(hidden: Tensor, head: Head, labels: Tensor, at: Tensor) -> Tensor:
    """The losses of the tokens where `at` is True, sequence after sequence; the head is applied for no others.

    Args:
        hidden: (B, T, hidden). labels: (B, T).
        at: (B, T) bool. Nothing predicts a sequence's first token: it is False there.

    Returns:
        One entry for each True of `at`.
    """
    return _each(hidden[:, :-1][at[:, 1:]], head, labels[at])


def _each(states: Tensor, head: Head, targets: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return head.losses(states, targets)


def _shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """States at t with the labels at t + 1, flattened: (B (L - 1), hidden) and (B (L - 1)) for L labels."""
    return hidden[:, : labels.shape[1] - 1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)
