"""Attention of one layer: our kernels, alternatives, and what a global layer costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zebra import kernels
from zebra.kernels import KERNELS, Mask, Request, attend
from zebra.measure import relative_error
from zebra.model.load import read_device, read_dtype
from zebra.plan.cost import Run, flops
from zebra.plan.decoder import decoder_from_config
from zebra.stripes import Stripes
from zebra_bench.configs import AttentionConfig
from zebra_bench.models import heads_in_words, planned_seconds
from zebra_bench.peers import PEERS, Attend
from zebra_bench.runner import Benchmark, Call, Variant, Workload

_COUNTED = frozenset({"banded"})
"""Kernels made of torch's own products, which its FLOP counter sees one by one; a fused kernel it only guesses."""


def benchmark(config: AttentionConfig) -> Benchmark:
    """q, k, v and the output's gradient through every kernel and alternative that can run here."""
    tensors = inputs(config, config.length)
    q = tensors[0]
    variants, left_out = [], []
    for name in own_kernels(tensors, config.window):
        attention = partial(attend_with, name, config.window)
        phases = _workloads(config, tensors, partial(_unprepared, attention), counts_flops=name in _COUNTED)
        gate = partial(_error, config, attention)
        variants.append(Variant(name=f"zebra, {name}", layout=f"L:{config.window}", workloads=phases, gate=gate))
    for peer in PEERS:
        if (reason := peer.declines(q)) is not None:
            left_out.append(f"{peer.name}: {reason}")
            continue
        if (reason := peer.backward(q)) is not None:
            left_out.append(f"{peer.name}, backward: {reason}")
        prepare = partial(peer.prepare, config.window)
        phases = _workloads(config, tensors, prepare, local=peer.local, backward=reason is None)
        layout = f"L:{config.window}" if peer.local else "full"
        variants.append(Variant(name=peer.name, layout=layout, workloads=phases, may_fail=peer.may_fail))
    task = f"attention: window {config.window}, {heads_in_words(config)}"
    return Benchmark(task=task, variants=tuple(variants), left_out=tuple(left_out))


def inputs(config: AttentionConfig, length: int) -> list[Tensor]:
    """q, k, v and the output's gradient, each (B, heads, T, D)."""
    device, dtype = read_device(config.device), read_dtype(config.dtype)
    torch.manual_seed(config.seed)
    heads = config.heads, config.kv_heads, config.kv_heads, config.heads
    return [torch.randn(config.batch_size, h, length, config.head_dim, device=device, dtype=dtype) for h in heads]


def own_kernels(tensors: list[Tensor], window: int) -> list[str]:
    """The kernels that serve a local layer here, backward included, without the formula itself."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    request = Request(q=q, k=k, v=v, mask=Mask(window), scale=1.0, with_lse=False)
    return [one.name for one in KERNELS if one.name != "reference" and one.declines(request) is None]


def attend_with(kernel: str, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A local layer's attention by a named kernel: q (B, H, T, D), k and v (B, K, T, D) to (B, H, T, D)."""
    with kernels.only(kernel):
        return attend(q, k, v, Mask(window), with_lse=False)[0]


def _unprepared(attention: Attend, q: Tensor) -> Attend:
    """A kernel of ours prepares nothing."""
    return attention


def _workloads(
    config: AttentionConfig,
    tensors: list[Tensor],
    prepare: Callable[[Tensor], Attend],
    *,
    local: bool = True,
    backward: bool = True,
    counts_flops: bool = False,
) -> tuple[Workload, ...]:
    """Forward, and forward + backward."""

    def prepare_forward() -> Call:
        attention = prepare(tensors[0])

        @torch.no_grad()
        def forward() -> list[Tensor]:
            return [attention(*tensors[:3])]

        return forward

    def prepare_both() -> Call:
        return partial(forward_backward, prepare(tensors[0]), tensors)

    phases: list[tuple[str, str, Callable[[], Call]]] = [("", "prefill", prepare_forward)]
    phases += [("_forward_backward", "train", prepare_both)] if backward else []
    workloads = []
    for suffix, phase, call in phases:
        run = _plan_run(config, phase, local)
        workloads.append(
            Workload(
                prepare=call,
                prepared_is_extra=True,
                suffix=suffix,
                useful_flops=flops(run)["attention"],
                counts_flops=counts_flops,
                planned=planned_seconds(run, "attention"),
            )
        )
    return tuple(workloads)


def forward_backward(attention: Attend, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def _error(config: AttentionConfig, attention: Attend) -> float:
    """Against the formula at an odd length beyond the window, gradients included."""
    tensors = inputs(config, config.window + 257)
    tensors = [tensor[:1, : max(1, tensor.shape[1] * 2 // config.heads)] for tensor in tensors]
    expected = forward_backward(partial(attend_with, "reference", config.window), tensors)
    return relative_error(forward_backward(attention, tensors), expected)


def _plan_run(config: AttentionConfig, phase: str, local: bool) -> Run:
    """A decoder of this one layer, for the plan."""
    fields = {
        "num_hidden_layers": 1,
        "hidden_size": config.heads * config.head_dim,
        "head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": 1,
        "vocab_size": 1,
        "max_position_embeddings": config.length,
    }
    return Run(
        decoder=decoder_from_config(fields, name="one layer"),
        stripes=Stripes(config.window, pattern="L") if local else None,
        length=config.length,
        batch=config.batch_size,
        dtype=config.dtype,
        phase=phase,
    )
