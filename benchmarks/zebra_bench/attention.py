"""One layer's attention: our kernels beside what else computes it, and beside what a dense layer costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zebra import kernels
from zebra.kernels import KERNELS, Mask, Request, attend
from zebra.measure import relative_error
from zebra.model.load import read_device, read_dtype
from zebra.plan.cost import Run, flops
from zebra.plan.decoder import decoder
from zebra.plan.devices import Device
from zebra.stripes import Stripes
from zebra_bench.pairing import Call, Case, Variant, Work
from zebra_bench.peers import PEERS, Attend
from zebra_bench.subjects import Attention

_COUNTED = frozenset({"banded"})
"""Kernels made of torch's own products, which its counter of FLOPs sees one by one; a fused kernel it only guesses."""


def case(sizes: Attention) -> Case:
    """q, k, v and the output's gradient, and every way that can run here."""
    tensors = inputs(sizes, sizes.length)
    q = tensors[0]
    variants, left_out = [], []
    for name in ours(tensors, sizes.window):
        serve = partial(_by_kernel, name, sizes.window)
        works = _works(sizes, tensors, partial(_as_it_is, serve), True, name in _COUNTED, None)
        gate = partial(_error, sizes, serve)
        variants.append(Variant(name=f"zebra, {name}", layout=f"L:{sizes.window}", works=works, gate=gate))
    for peer in PEERS:
        if (reason := peer.declines(q)) is not None:
            left_out.append(f"{peer.name}: {reason}")
            continue
        if (reason := peer.backward(q)) is not None:
            left_out.append(f"{peer.name}, backward: {reason}")
        works = _works(sizes, tensors, partial(peer.prepare, sizes.window), peer.local, False, reason)
        layout = f"L:{sizes.window}" if peer.local else "full"
        variants.append(Variant(name=peer.name, layout=layout, works=works, may_fail=peer.may_fail))
    heads = f"{sizes.heads} heads" + (f", {sizes.kv_heads} of keys," if sizes.kv_heads != sizes.heads else "")
    batch = f", {sizes.batch} rows" if sizes.batch > 1 else ""
    task = f"attention: window {sizes.window}, {heads} of {sizes.head_size}{batch}"
    return Case(task=task, variants=tuple(variants), left_out=tuple(left_out))


def inputs(sizes: Attention, length: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    device, dtype = read_device(sizes.device), read_dtype(sizes.dtype)
    torch.manual_seed(sizes.seed)
    heads = sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads
    return [torch.randn(sizes.batch, h, length, sizes.head_size, device=device, dtype=dtype) for h in heads]


def ours(tensors: list[Tensor], window: int) -> list[str]:
    """The kernels that serve a local layer here, its backward too; not the formula itself."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    request = Request(q=q, k=k, v=v, mask=Mask(window), scale=1.0, with_lse=False)
    return [one.name for one in KERNELS if one.name != "reference" and one.declines(request) is None]


def _by_kernel(name: str, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with kernels.only(name):
        return attend(q, k, v, Mask(window), with_lse=False)[0]


def _as_it_is(serve: Attend, q: Tensor) -> Attend:
    """A kernel of ours prepares nothing."""
    return serve


def _works(
    sizes: Attention,
    tensors: list[Tensor],
    prepare: Callable[[Tensor], Attend],
    local: bool,
    counted: bool,
    no_backward: str | None,
) -> tuple[Work, ...]:
    def forward() -> Call:
        call = prepare(tensors[0])

        @torch.no_grad()
        def run() -> list[Tensor]:
            return [call(*tensors[:3])]

        return run

    def both() -> Call:
        call = prepare(tensors[0])
        return lambda: forward_backward(call, tensors)

    works = []
    phases: list[tuple[str, str, Any]] = [("", "prefill", forward)]
    phases += [("_forward_backward", "train", both)] if no_backward is None else []
    for suffix, phase, make in phases:
        run = _planned(sizes, phase, local)
        seconds = partial(_attention_seconds, run)
        useful = flops(run)["attention"]
        works.append(
            Work(
                prepare=make,
                prepares_extra=True,
                suffix=suffix,
                useful=useful,
                counted=counted,
                planned=seconds,
            )
        )
    return tuple(works)


def forward_backward(call: Attend, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def _error(sizes: Attention, serve: Attend) -> float:
    """Against the formula at an odd length beyond the window, gradients included."""
    tensors = inputs(sizes, sizes.window + 257)
    tensors = [tensor[:1, : max(1, tensor.shape[1] * 2 // sizes.heads)] for tensor in tensors]
    wanted = forward_backward(partial(_by_kernel, "reference", sizes.window), tensors)
    return relative_error(forward_backward(serve, tensors), wanted)


def _planned(sizes: Attention, phase: str, local: bool) -> Run:
    """A decoder of this one layer, for the plan."""
    fields = {"num_hidden_layers": 1, "hidden_size": sizes.heads * sizes.head_size, "head_dim": sizes.head_size}
    fields |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "intermediate_size": 1}
    fields |= {"vocab_size": 1, "max_position_embeddings": sizes.length}
    stripes = Stripes(sizes.window, pattern="L") if local else None
    layer = decoder(fields, name="one layer")
    return Run(decoder=layer, stripes=stripes, length=sizes.length, batch=sizes.batch, dtype=sizes.dtype, phase=phase)


def _attention_seconds(run: Run, device: Device) -> float:
    return device.seconds(run)["attention"]
