"""One local decoder layer of transformers, with its mask and the last norm, under each attention implementation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zebra.measure import relative_error
from zebra.model.attention import NAME
from zebra.model.load import read_device, read_dtype
from zebra.stripes import Stripes
from zebra_bench.configs import LayerConfig
from zebra_bench.models import llama_config, plan_run, planned_seconds, random_model, sizes_in_words
from zebra_bench.peers import flex_reason, too_large
from zebra_bench.runner import Benchmark, Call, Variant, Workload

_PARTS = ("projections", "attention", "MLP", "elementwise")


def benchmark(config: LayerConfig) -> Benchmark:
    """Hidden states into the same weights, forward and forward + backward."""
    device = read_device(config.device)
    left_out = []
    variants = [_variant(config, "zebra", NAME), _variant(config, "transformers, sdpa", "sdpa")]
    if reason := too_large(config.batch_size * config.heads * config.length**2, device):
        left_out.append(f"transformers, eager: {reason}")
    else:
        variants.append(_variant(config, "transformers, eager", "eager"))
    if reason := flex_reason(device):
        left_out.append(f"transformers, flex: {reason}")
    else:
        on_gpu = device != "cpu"
        variants.append(_variant(config, "transformers, flex", "flex_attention", backward=on_gpu))
        left_out += [] if on_gpu else ["transformers, flex, backward: it has none on a CPU"]
    task = f"layer: window {config.window}, {sizes_in_words(config)}"
    return Benchmark(task=task, variants=tuple(variants), left_out=tuple(left_out))


def _stripes(config: LayerConfig) -> Stripes:
    return Stripes(config.window, pattern="L")


def _variant(config: LayerConfig, name: str, attention: str, backward: bool = True) -> Variant:
    workloads = [
        Workload(
            prepare=partial(_prepare, config, attention, bool(suffix)),
            suffix=suffix,
            tokens=config.batch_size * config.length,
            planned=planned_seconds(plan_run(config, _stripes(config), phase), *_PARTS),
        )
        for suffix, phase in (("", "prefill"), ("_forward_backward", "train"))[: 1 + backward]
    ]
    return Variant(
        name=name,
        layout=str(_stripes(config)),
        workloads=tuple(workloads),
        gate=partial(_error, config) if attention == NAME else None,
        may_fail=attention == "flex_attention",
    )


def _model(config: LayerConfig, attention: str) -> Any:
    return random_model(config, llama_config(config, _stripes(config)), attention).model


def _states(config: LayerConfig) -> list[Tensor]:
    """Hidden states (B, T, h) and the output's gradient."""
    torch.manual_seed(config.seed)
    shape = config.batch_size, config.length, config.heads * config.head_dim
    device, dtype = read_device(config.device), read_dtype(config.dtype)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]


def _prepare(config: LayerConfig, attention: str, backward: bool) -> Call:
    model = _model(config, attention)
    states, grad = _states(config)
    if backward:
        return partial(_forward_backward, model, states, grad)

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [model(inputs_embeds=states, use_cache=False).last_hidden_state]

    return forward


def _forward_backward(model: Any, states: Tensor, grad: Tensor) -> list[Tensor]:
    states = states.detach().requires_grad_()
    weights = [parameter for name, parameter in model.named_parameters() if "embed" not in name]
    out = model(inputs_embeds=states, use_cache=False).last_hidden_state
    return [out.detach(), *torch.autograd.grad(out, (states, *weights), grad)]


def _error(config: LayerConfig) -> float:
    """Output and all gradients against transformers' eager attention, at an odd length beyond the window."""
    small = replace(config, length=config.window + 257, batch_size=1)
    states, grad = _states(small)
    results = []
    for attention in (NAME, "eager"):
        out, *gradients = _forward_backward(_model(small, attention), states, grad)
        results.append([out, torch.cat([gradient.flatten() for gradient in gradients])])
    return relative_error(*results)
