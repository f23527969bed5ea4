"""Measured time of a local layer beside its alternatives: interleaved in one process, gated by correctness."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zebra import kernels
from zebra.kernels import Mask, attend
from zebra.model.hosts import best_device, device_name
from zebra.records import Row
from zebra.refusal import Refusal

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def local_attention(
    *,
    length: int,
    window: int,
    heads: int = 12,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
    seed: int = 0,
) -> list[Row]:
    """Milliseconds of forward + backward of one local layer, and of what else one could run: the median of `repeats`.

    The peers are torch's dense mask, which is what transformers runs for a sliding layer without flash-attn, and
    torch's causal kernel, which is what a dense layer costs. The variants take turns, so that a change of the
    machine's speed hits all alike.

    Raises:
        Refusal: a variant that computes something else than the formula; no row is made then.
    """
    device = best_device()
    torch.manual_seed(seed)
    q, k, v, grad = (torch.randn(1, heads, length, head_size, device=device, dtype=dtype) for _ in range(4))
    position = torch.arange(length, device=device)
    band = Mask(window).visible(position, position)
    variants: dict[str, Callable[..., Tensor]] = {
        "zebra banded": lambda q, k, v: attend(q, k, v, Mask(window), with_lse=False)[0],
        "sdpa, dense mask": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=band),
        "sdpa, causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    _gate(variants, dtype, device, window)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            _wait(device)
            start = time.perf_counter()
            variant(*inputs).backward(grad)
            _wait(device)
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - start) * 1000)
    return [
        Row(
            run="bench",
            model=name,
            layout="dense" if "causal" in name else f"L:{window}",
            task=f"attention, {heads} heads of {head_size}, {str(dtype).removeprefix('torch.')}",
            metric="forward_backward_milliseconds",
            value=statistics.median(taken),
            length=length,
            n=len(taken),
            low=min(taken),
            high=max(taken),
            seed=seed,
            device=device_name(device),
        )
        for name, taken in times.items()
    ]


def _gate(variants: dict[str, Callable[..., Tensor]], dtype: torch.dtype, device: str, window: int) -> None:
    """A fast wrong answer is no result: our kernel against the formula, at an odd length beyond the window."""
    q, k, v = (torch.randn(1, 2, window + 131, 16, device=device, dtype=dtype) for _ in range(3))
    with kernels.only("reference"):
        wanted, _ = attend(q, k, v, Mask(window))
    found = variants["zebra banded"](q, k, v)
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= TOLERANCE[dtype]:
        raise Refusal(f"the local kernel is off by {error:.1e} of the formula, more than {TOLERANCE[dtype]:.0e}.")


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
