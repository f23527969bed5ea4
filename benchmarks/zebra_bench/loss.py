"""Head and loss, forward + backward: ours, which never holds all logits, and full logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from zebra.measure import relative_error
from zebra.model.load import read_device, read_dtype
from zebra.model.loss import Head, summed_loss
from zebra.plan.cost import Run
from zebra.plan.decoder import decoder_from_config
from zebra_bench.configs import LossConfig
from zebra_bench.models import planned_seconds
from zebra_bench.runner import Benchmark, Variant, Workload

Loss = Callable[[Tensor, nn.Parameter, Tensor], Tensor]


def benchmark(config: LossConfig) -> Benchmark:
    """Hidden states, the head's weight and labels to the loss and both gradients."""
    tensors = _inputs(config, config.length)
    run = _plan_run(config)

    def workloads(loss: Loss) -> tuple[Workload, ...]:
        return (
            Workload(
                prepare=lambda: partial(_forward_backward, loss, tensors),
                suffix="_forward_backward",
                tokens=config.batch_size * config.length,
                planned=planned_seconds(run, "head"),
            ),
        )

    variants = (
        Variant(name="zebra", layout="", workloads=workloads(_own_loss), gate=partial(_error, config)),
        Variant(name="full logits", layout="", workloads=workloads(_loss_of_full_logits)),
    )
    batch = f", batch of {config.batch_size}" if config.batch_size > 1 else ""
    task = f"loss: vocabulary {config.vocab_size}, hidden size {config.hidden_size}{batch}"
    return Benchmark(task=task, variants=variants)


def _plan_run(config: LossConfig) -> Run:
    fields = {
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "num_attention_heads": 1,
        "intermediate_size": 1,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
    }
    return Run(
        decoder=decoder_from_config(fields, name="one head"),
        stripes=None,
        length=config.length,
        batch=config.batch_size,
        dtype=config.dtype,
        phase="train",
    )


def _inputs(config: LossConfig, length: int) -> list[Tensor]:
    """Hidden states (B, T, h), the head's weight (V, h), labels (B, T)."""
    device, dtype = read_device(config.device), read_dtype(config.dtype)
    torch.manual_seed(config.seed)
    hidden = torch.randn(config.batch_size, length, config.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(config.vocab_size, config.hidden_size, device=device, dtype=dtype) * config.hidden_size**-0.5
    return [hidden, weight, torch.randint(config.vocab_size, (config.batch_size, length), device=device)]


def _own_loss(hidden: Tensor, weight: nn.Parameter, labels: Tensor) -> Tensor:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = weight
    return summed_loss(hidden, Head(module), labels) / labels[:, 1:].numel()


def _loss_of_full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers does: logits of all tokens, in float32, and the labels shifted by padding them."""
    logits = functional.linear(hidden, weight).float()
    targets = functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets, ignore_index=-100)


def _forward_backward(loss: Loss, tensors: list[Tensor]) -> list[Tensor]:
    hidden, weight = tensors[0].detach().requires_grad_(), nn.Parameter(tensors[1])
    total = loss(hidden, weight, tensors[2])
    return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]


def _error(config: LossConfig) -> float:
    """Against full logits in float32."""
    tensors = _inputs(config, min(config.length, 131))
    exact = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
    return relative_error(_forward_backward(_own_loss, tensors), _forward_backward(_loss_of_full_logits, exact))
