"""A training step of a random model: forward, loss, backward, fused AdamW; ours, and transformers' default."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zebra.measure import relative_error
from zebra.model.attention import NAME
from zebra.stripes import Stripes
from zebra_bench.configs import TrainStepConfig
from zebra_bench.models import (
    llama_config,
    own_loss,
    plan_run,
    planned_seconds,
    random_model,
    random_tokens,
    sizes_in_words,
)
from zebra_bench.runner import Benchmark, Call, Variant, Workload

Loss = Callable[[Any, Tensor], Tensor]


def benchmark(config: TrainStepConfig) -> Benchmark:
    """The same weights with transformers' sdpa and full logits, and with our attention and the loss by chunks."""
    run = plan_run(config, Stripes.parse(config.stripes), "train")

    def variant(name: str, attention: str, loss: Loss) -> Variant:
        workload = Workload(
            prepare=partial(_prepare, config, attention, loss),
            tokens=config.batch_size * config.length,
            planned=planned_seconds(run),
        )
        gate = partial(_error, config) if attention == NAME else None
        return Variant(name=name, layout=str(run.stripes), workloads=(workload,), gate=gate)

    million = run.decoder.num_parameters / 1e6
    task = f"train step: {million:.1f}M parameters, {sizes_in_words(config)}, vocabulary {config.vocab_size}"
    variants = variant("zebra", NAME, own_loss), variant("transformers, sdpa", "sdpa", _loss_of_transformers)
    return Benchmark(task=task, variants=variants)


def _loss_of_transformers(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, labels=tokens, use_cache=False).loss


def _autocast(config: TrainStepConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if config.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _model(config: TrainStepConfig, attention: str) -> Any:
    model_config = llama_config(config, Stripes.parse(config.stripes))
    return random_model(config, model_config, attention, torch.float32).train()


def _prepare(config: TrainStepConfig, attention: str, loss: Loss) -> Call:
    """A model and its optimizer with moments, so that the first step is like the others."""
    model, tokens = _model(config, attention), random_tokens(config, config.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(config, tokens.device):
            total = loss(model, tokens)
        total.backward()
        optimizer.step()
        return [parameter.grad for parameter in model.parameters()]

    return step


def _error(config: TrainStepConfig) -> float:
    """Loss and all gradients against eager attention with full logits, at an odd length beyond the window."""
    length, layers = Stripes.parse(config.stripes).window + 257, min(config.layers, 4)
    vocab_size = min(config.vocab_size, 1000)
    small = replace(config, length=length, batch_size=1, layers=layers, vocab_size=vocab_size)
    tokens = random_tokens(small, small.length)
    results = []
    for attention, loss in ((NAME, own_loss), ("eager", _loss_of_transformers)):
        model = _model(small, attention)
        with _autocast(small, tokens.device):
            total = loss(model, tokens)
        total.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append([total.detach(), gradients])
    return relative_error(*results)
