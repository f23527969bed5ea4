"""Attention on a GPU by torch's flex_attention, where flash attention cannot serve: softcap, float32, odd head sizes.

    keys ->   S = 10, blocks of 2        # full: every query of the block sees every key; no mask is read
    queries   # / . . .                  / partial: the mask is applied inside the kernel
              # # / . .                  . neither computed nor read
              . # # / .      a block's kind follows from the first and last key that its queries see, and
              . . # # /      from a running count of the real keys: no N x N mask is built

Query i sees the real keys of one run, [first_i, end_i) (`Mask.key_ranges`). Neither bound decreases, so the bounds of a
block are those of its first and last query.

Its mask and scores are tested on a CPU, in torch's dense form of flex_attention. It has not yet run on a GPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra.kernels.request import Kernel, Mask, Request

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""The number of queries, and of keys, in a block."""


def blocks(first: Tensor, end: Tensor, real: Tensor | None, keys: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Which blocks of (query, key) are partial, and which are full: two bool (1 or B, query blocks, key blocks).

    Args:
        first: (1 or B, T), the first key that each query sees.
        end: (1 or B, T), one past the last key that it sees.
        real: (B, S) bool, None where there is no padding.
    """
    queries, device = first.shape[1], first.device
    top = torch.arange(0, queries, block, device=device)  # the first and the last query of each block
    bottom = (top + block).clamp(max=queries) - 1
    left = torch.arange(0, keys, block, device=device)  # likewise of the keys, exclusive at the end
    right = (left + block).clamp(max=keys)
    # All that any query of the block sees: from the first key of the top one to the end of the bottom one.
    low = torch.maximum(first[:, top, None], left)
    high = torch.minimum(end[:, bottom, None], right)
    inside = (left >= first[:, bottom, None]) & (right <= end[:, top, None])
    whole = (bottom - top + 1 == block)[:, None] & (right - left == block)
    if real is None:
        some, full = low < high, inside & whole
    else:
        count = pad(real.cumsum(dim=1), (1, 0))  # real keys before each
        batch = torch.arange(len(real), device=device)[:, None, None]
        some = (low < high) & (count[batch, high.clamp(min=0)] > count[batch, low.clamp(max=keys)])
        full = inside & whole & (count[:, right] - count[:, left] == block)[:, None]
    return some & ~full, full


def block_mask(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """torch's BlockMask for a mask over T queries and S keys, with the mask function that partial blocks need."""
    from torch.nn.attention.flex_attention import BlockMask

    first, end = mask.key_ranges(queries, keys, device)
    real = None if mask.keys is None else mask.keys.bool()
    partial, full = (x.expand(batch, -1, -1)[:, None].to(torch.int32) for x in blocks(first, end, real, keys))
    first, end = (x.expand(batch, -1).to(torch.int32).contiguous() for x in (first, end))

    # Only tensors are captured: a Python number would need a new compilation for each window and past length.
    def sees(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        return (j >= first[b, q]) & (j < end[b, q])

    def sees_real(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        assert real is not None
        return (j >= first[b, q]) & (j < end[b, q]) & real[b, j]

    return BlockMask.from_kv_blocks(
        partial.sum(dim=-1, dtype=torch.int32),
        partial.argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        full.sum(dim=-1, dtype=torch.int32),
        full.argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees if real is None else sees_real,
        seq_lengths=(queries, keys),
    )


MAX_COMPILATIONS = 64


@functools.cache
def _compiled() -> Any:
    """flex_attention, compiled once for all lengths and windows, and again for another dtype, head count or mask part.

    Beyond its limit of eight compilations torch would silently run it dense. Here the limit is higher, and an error.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
            return compiled(*args, **kwargs)

    return run


def flex(request: Request) -> tuple[Tensor, Tensor | None]:
    """flex_attention under the block mask: out (B, H, T, D), lse (B, H, T).

    It is not compiled here on a CPU (where it runs dense, for tests) or inside a traced model.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    q = request.q
    attention = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    score = None
    if request.softcap is not None:
        cap = torch.full((), request.softcap, dtype=torch.float32, device=q.device)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return cap * torch.tanh(s / cap)

    out, aux = attention(
        q,
        request.k,
        request.v,
        score_mod=score,
        block_mask=block_mask(request.mask, q.shape[0], request.queries, request.keys, q.device),
        scale=request.scale,
        enable_gqa=q.shape[1] != request.k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse if request.with_lse else None


def _unsupported_reason(request: Request) -> str | None:
    if request.q.shape[3] < 16:
        return "it supports head sizes of at least 16"
    if request.q.is_cuda and torch.cuda.get_device_capability(request.q.device) < (7, 0):
        return "its compiler needs a GPU of compute capability 7.0 or newer"
    return None


KERNEL = Kernel(
    name="flex",
    summary="torch's flex_attention, compiled: softcap, float32, gradient of the log-sum-exp, on a GPU",
    run=flex,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    softcap=True,
    unsupported_reason=_unsupported_reason,
)
