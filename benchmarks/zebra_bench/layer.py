"""One local decoder layer as the host runs it, its mask and the last norm included, under each attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zebra.measure import relative_error
from zebra.model.attention import NAME
from zebra.model.load import read_device, read_dtype
from zebra.plan.cost import Run
from zebra.plan.devices import Device
from zebra.stripes import Stripes
from zebra_bench.models import config, named, planned, random_model
from zebra_bench.pairing import Call, Case, Variant, Work
from zebra_bench.peers import flex_reason, too_large
from zebra_bench.subjects import Layer

_PARTS = ("projections", "attention", "MLP", "elementwise")


def case(sizes: Layer) -> Case:
    """Hidden states into the same weights, forward and forward + backward."""
    device = read_device(sizes.device)
    left_out = []
    variants = [_variant(sizes, "zebra", NAME), _variant(sizes, "transformers, sdpa", "sdpa")]
    if reason := too_large(sizes.batch * sizes.heads * sizes.length**2, device):
        left_out.append(f"transformers, eager: {reason}")
    else:
        variants.append(_variant(sizes, "transformers, eager", "eager"))
    if reason := flex_reason(device):
        left_out.append(f"transformers, flex: {reason}")
    else:
        on_gpu = device != "cpu"
        variants.append(_variant(sizes, "transformers, flex", "flex_attention", backward=on_gpu))
        left_out += [] if on_gpu else ["transformers, flex, backward: it has none on a CPU"]
    task = f"layer: window {sizes.window}, {named(sizes)}"
    return Case(task=task, variants=tuple(variants), left_out=tuple(left_out))


def _variant(sizes: Layer, name: str, attention: str, backward: bool = True) -> Variant:
    stripes = Stripes(sizes.window, pattern="L")
    made = config(sizes, stripes)
    works = []
    for suffix, phase in (("", "prefill"), ("_forward_backward", "train"))[: 1 + backward]:
        run = planned(sizes, made, stripes, phase)
        prepare = partial(_prepare, sizes, attention, bool(suffix))
        tokens = sizes.batch * sizes.length
        works.append(Work(prepare=prepare, suffix=suffix, tokens=tokens, planned=partial(_seconds, run)))
    gate = partial(_error, sizes) if attention == NAME else None
    return Variant(
        name=name, layout=str(stripes), works=tuple(works), gate=gate, may_fail=attention == "flex_attention"
    )


def _states(sizes: Layer, length: int) -> list[Tensor]:
    """Hidden states and the output's gradient."""
    torch.manual_seed(sizes.seed)
    shape = sizes.batch, length, sizes.heads * sizes.head_size
    device, dtype = read_device(sizes.device), read_dtype(sizes.dtype)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]


def _prepare(sizes: Layer, attention: str, backward: bool) -> Call:
    model = random_model(sizes, config(sizes, Stripes(sizes.window, pattern="L")), attention).model
    states, grad = _states(sizes, sizes.length)
    if backward:
        return lambda: _forward_backward(model, states, grad)

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [model(inputs_embeds=states, use_cache=False).last_hidden_state]

    return forward


def _forward_backward(model: Any, states: Tensor, grad: Tensor) -> list[Tensor]:
    states = states.detach().requires_grad_()
    weights = [parameter for name, parameter in model.named_parameters() if "embed" not in name]
    out = model(inputs_embeds=states, use_cache=False).last_hidden_state
    return [out.detach(), *torch.autograd.grad(out, (states, *weights), grad)]


def _error(sizes: Layer) -> float:
    """Output and all gradients against the host's eager, at an odd length beyond the window."""
    small = replace(sizes, length=sizes.window + 257, batch=1)
    states, grad = _states(small, small.length)
    made = config(small, Stripes(sizes.window, pattern="L"))
    found, wanted = (
        _forward_backward(random_model(small, made, attention).model, states, grad) for attention in (NAME, "eager")
    )
    flat = ([part[0], torch.cat([tensor.flatten() for tensor in part[1:]])] for part in (found, wanted))
    return relative_error(*flat)


def _seconds(run: Run, device: Device) -> float:
    """The plan's, of what is in a layer."""
    found = device.seconds(run)
    return sum(found[part] for part in _PARTS)
