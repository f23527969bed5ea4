r"""Global attention by torch's own fused kernels, where they need no explicit mask: plain causal, and decoding.

They align the causal mask at the first key, so a chunk of queries after earlier keys would need an explicit mask. On a
CPU a chunk is two calls without a mask, merged by their log-sum-exps:

    keys      0 ........... S - T ... S
    queries   p p p p p p p p  \           past   seen whole by every query: a group's heads are rows, as in decoding
       S - 1  p p p p p p p p  n \         new    plain causal

The public `scaled_dot_product_attention` does not return its log-sum-exp. Requests that need it call the operator
behind it, on a CPU and without gradients: the operator silently drops the gradient of the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zebra.kernels.merging import merge
from zebra.kernels.request import Kernel, Request

_LSE: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""(q, k, v, dropout, causal, mask to add, scale) -> (out, lse), natural logarithm; causal from the first key."""

_LONG = 1024
"""From so many queries on, zebra's own kernels are faster. Fewer should not wait for `native` to be compiled."""

_HEAD_BYTES = 512
"""The largest head, in bytes, for which a chunk of queries runs as two calls."""


def fused(request: Request) -> tuple[Tensor, Tensor | None]:
    """`scaled_dot_product_attention`, with a group's heads as rows in decoding: out (B, H, T, D), lse (B, H, T)."""
    q, k, v = request.q, request.k, request.v
    if 1 < request.queries < request.keys:
        past = request.keys - request.queries
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        out, lse = _LSE(rows, k[:, :, :past], v[:, :, :past], 0.0, False, scale=request.scale)
        new, new_lse = _LSE(q, k[:, :, past:], v[:, :, past:], 0.0, True, scale=request.scale)
        return merge(new, new_lse, out.reshape(q.shape), lse.reshape(q.shape[:3]), with_lse=request.with_lse)
    if request.queries > 1:
        if request.with_lse:
            out, lse = _LSE(q, k, v, 0.0, True, scale=request.scale)
            return out, lse
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=request.scale, enable_gqa=grouped), None
    # One query: its group's heads become rows over the same keys. `enable_gqa` is 2 to 12 times slower here on a CPU.
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    visible = None if request.mask.keys is None else request.mask.keys[:, None, None, :]
    if request.with_lse:
        hidden = None if visible is None else q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        out, lse = _LSE(rows, k, v, 0.0, False, attn_mask=hidden, scale=request.scale)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    out = scaled_dot_product_attention(rows, k, v, attn_mask=visible, scale=request.scale)
    return out.view(*q.shape[:3], v.shape[3]), None


def _unsupported_reason(request: Request) -> str | None:
    if request.mask.window is not None:
        return "it does not support a window"
    if request.scale <= 0:
        return "torch's causal kernel gives NaN for a scale that is not positive"
    if request.v.shape[3] != request.q.shape[3] and (request.queries > 1 or request.with_lse):
        return "it supports values of another head size only in decoding without log-sum-exp"
    if request.mask.documents is not None:
        return "it does not keep packed documents apart"
    if request.queries > 1 and request.mask.keys is not None:
        return "it would build a mask for padding"
    chunk = 1 < request.queries < request.keys
    if chunk and (reason := _no_chunk(request)) is not None:
        return f"it would build a mask for a chunk of queries after earlier keys, as {reason}"
    if _is_long(request) and request.q.dtype == torch.bfloat16 and request.q.device.type == "cpu":
        return "tiles are faster than torch's bfloat16 kernel on a CPU"
    if request.with_lse and (reason := _no_lse(request)) is not None:
        return reason
    if request.mask.keys is not None and not bool(request.mask.keys.any(dim=-1).all()):
        return "it gives NaN for a query that sees no key"
    return None


def _is_long(request: Request) -> bool:
    return request.queries >= _LONG and request.q.shape[3] >= 64


def _no_chunk(request: Request) -> str | None:
    """Why a chunk does not run as two calls, or None where it does.

    On a CPU with AVX-512, tiles took 1.1 to 1.2 times as long for 2,048 queries after 6,144 keys in float32 with head
    dimensions of 32 to 128; less than 1.0 in 16 bits, and in float64 with 128.
    """
    if request.q.element_size() < 4:
        return "tiles are faster in 16 bits"
    if request.q.shape[-1] * request.q.element_size() > _HEAD_BYTES:
        return "tiles are faster with heads this large"
    return _no_lse(request)


def _no_lse(request: Request) -> str | None:
    if request.q.device.type != "cpu" or _LSE is None:
        return "it returns a log-sum-exp only on a CPU, if torch has the operator"
    if request.wants_gradient:
        return "its log-sum-exp has no gradient"
    return None


KERNEL = Kernel(
    name="fused",
    summary="torch's scaled_dot_product_attention: plain causal, chunks and decode",
    run=fused,
    value_sizes=True,
    unsupported_reason=_unsupported_reason,
    slower_than=lambda request: "native" if request.queries >= _LONG else "decode",
)
