"""A training step of a whole random model: forward, loss, backward, fused AdamW; ours against the host's default."""

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
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.stripes import Stripes
from zebra_bench.models import config, named, planned, random_model, random_tokens
from zebra_bench.pairing import Call, Case, Variant, Work
from zebra_bench.subjects import TrainStep

Loss = Callable[[Any, Tensor], Tensor]


def case(sizes: TrainStep) -> Case:
    """The same weights under the host's sdpa with full logits, and under ours with the loss by chunks."""
    stripes = Stripes.parse(sizes.stripes)
    run = planned(sizes, config(sizes, stripes), stripes, "train")

    def work(attention: str, loss: Loss) -> tuple[Work, ...]:
        tokens = sizes.batch * sizes.length
        prepare = partial(_prepare, sizes, attention, loss)
        return (Work(prepare=prepare, tokens=tokens, planned=lambda device: sum(device.seconds(run).values())),)

    variants = (
        Variant(name="zebra", layout=str(stripes), works=work(NAME, _ours), gate=partial(_error, sizes)),
        Variant(name="transformers, sdpa", layout=str(stripes), works=work("sdpa", _hosts)),
    )
    million = run.decoder.size / 1e6
    task = f"train step: {million:.1f}M parameters, {named(sizes)}, {sizes.words} words"
    return Case(task=task, variants=variants)


def _ours(model: Any, tokens: Tensor) -> Tensor:
    states = model(tokens, **without_logits(tokens.device)).hidden_states[-1]
    return summed_loss(states, head_of(model), tokens) / tokens[:, 1:].numel()


def _hosts(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, labels=tokens, use_cache=False).loss


def _autocast(sizes: TrainStep, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if sizes.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _model(sizes: TrainStep, attention: str) -> Any:
    made = config(sizes, Stripes.parse(sizes.stripes))
    return random_model(sizes, made, attention, torch.float32).train()


def _prepare(sizes: TrainStep, attention: str, loss: Loss) -> Call:
    """A model and its optimiser with moments, so that the first step is like the others."""
    model, tokens = _model(sizes, attention), random_tokens(sizes, sizes.length)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)

    def step() -> list[Tensor]:
        optimiser.zero_grad(set_to_none=True)
        with _autocast(sizes, tokens.device):
            total = loss(model, tokens)
        total.backward()
        optimiser.step()
        return [parameter.grad for parameter in model.parameters()]

    return step


def _error(sizes: TrainStep) -> float:
    """All gradients and the loss against the host's eager with full logits, at an odd length beyond the window."""
    window = Stripes.parse(sizes.stripes).window
    small = replace(sizes, length=window + 257, batch=1, layers=min(sizes.layers, 4), words=min(sizes.words, 1000))
    tokens = random_tokens(small, small.length)
    found = []
    for attention, loss in ((NAME, _ours), ("eager", _hosts)):
        model = _model(small, attention)
        with _autocast(small, tokens.device):
            total = loss(model, tokens)
        total.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append([total.detach(), gradients])
    return relative_error(*found)
