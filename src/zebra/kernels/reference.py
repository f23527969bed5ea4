"""Attention by the plain formula: dense, in float32 or wider. The oracle for the other kernels, gradients included."""

from __future__ import annotations

import torch
from torch import Tensor

from zebra.kernels.request import Kernel, Request


def reference(request: Request) -> tuple[Tensor, Tensor | None]:
    """One score matrix, one mask, one softmax, in O(T * S) time and memory: out (B, H, T, D), lse (B, H, T)."""
    group = request.q.shape[1] // request.k.shape[1]
    wide = torch.promote_types(request.q.dtype, torch.float32)
    with torch.autocast(request.q.device.type, enabled=False):
        q = request.q.to(wide)
        k = request.k.to(wide).repeat_interleave(group, dim=1)
        v = request.v.to(wide).repeat_interleave(group, dim=1)
        scores = q @ k.mT * request.scale
        if request.softcap is not None:
            scores = request.softcap * torch.tanh(scores / request.softcap)
        j = torch.arange(request.keys, device=q.device)
        i = j[request.keys - request.queries :]
        if request.slopes is not None:
            scores = scores - request.slopes.to(wide)[:, None, None] * (i[:, None] - j)
        visible = request.mask.visible(i, j)
        weights, lse = masked_softmax(scores, visible)
        out = weights @ v
    return out.to(request.q.dtype), lse if request.with_lse else None


def masked_softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over visible keys and its log-sum-exp; 0 and -inf for a query that sees none.

    Args:
        scores: (..., T, S).
        visible: bool, broadcasts against the scores.

    Returns:
        weights: (..., T, S). lse: (..., T).
    """
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    seen = visible.any(dim=-1, keepdim=True)
    return torch.exp(scores - lse.unsqueeze(-1).where(seen, 0.0)), lse


KERNEL = Kernel(
    name="reference",
    summary="the formula, dense: the oracle",
    run=reference,
    softcap=True,
    sinks=True,
    slopes=True,
    value_sizes=True,
)
