"""Attention on a GPU by torch's own variable-length flash attention: windows, packed documents, padding, chunks.

    entry 0   . . a a a a | b b b    documents a and b after two tokens of padding
    entry 1   c c c c c c c . .      padding after c
    call 1    a a a a b b b c c c c c c c   with the bounds 0 4 7 14: only real tokens, one band below each diagonal
    call 2    the padding queries after c, which see c and are not seen

The kernel aligns the queries and keys of a sequence at their last token (FlashAttention 2.1, arXiv 2307.08691), as
`attend` does, so chunks and decoding need no mask of their own. Its log-sum-exp is natural, float32, (H, tokens).

Everything but the call of torch is tested on a CPU, with a placeholder for that call. It has not yet run on a GPU.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra.kernels.request import Kernel, Mask, Request


class Packing(NamedTuple):
    """The sequences of one call, concatenated."""

    queries: Tensor | None  # (n,), indices into the B * T queries, None for all in order
    keys: Tensor | None  # (m,), indices into the B * S keys, None for all in order
    query_bounds: Tensor  # (sequences + 1,) int32, where each sequence's queries begin and end
    key_bounds: Tensor  # (sequences + 1,) int32, the same of its keys
    max_queries: int  # at least the queries of any sequence
    max_keys: int  # at least its keys
    window: tuple[int, int]  # of the last query: how many keys before and after its own it sees, -1 for all
    valid: Tensor | None = None  # (n,) bool, which results to use; None for all


def packings(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> list[Packing]:
    """The calls that together compute every query that sees a key, each query once.

    Padding must be before or after the tokens of a sequence, not between them (`Mask.has_padding_holes`).
    """
    left = -1 if mask.window is None else mask.window - 1
    if mask.keys is None and mask.documents is None:
        whole = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return [Packing(None, None, whole * queries, whole * keys, queries, keys, (left, 0))]
    j = torch.arange(keys, device=device)
    starts = mask.document_starts(keys, device).expand(batch, keys)
    number = (starts == j).flatten().cumsum(0).view(batch, keys) - 1  # of each key's sequence in the batch
    real = torch.ones_like(starts, dtype=torch.bool) if mask.keys is None else mask.keys.bool()
    has_query = (j >= keys - queries).expand(batch, keys)
    result = []
    real_queries = has_query & real
    if bool(real_queries.any()):
        result.append(_pack(real, number, real_queries, queries, (left, 0)))
    last = torch.where(real, j, -1).cummax(dim=1).values  # the last real token so far
    behind = j - last
    tail = has_query & ~real & (last >= starts)
    if mask.window is not None:
        tail &= behind < mask.window
    if bool(tail.any()):
        packing = _pack(real, number, tail, queries, (-1, -1))
        result.append(packing if mask.window is None else _aligned(packing, behind[tail], mask.window))
    return result


def _pack(real: Tensor, number: Tensor, selected: Tensor, queries: int, window: tuple[int, int]) -> Packing:
    """The selected queries against all real keys of their sequences.

    real, selected: (B, S) bool. number: (B, S), each key's sequence.
    """
    query_counts = torch.bincount(number[selected], minlength=number.numel())
    keys = real & (query_counts[number] > 0)
    key_counts = torch.bincount(number[keys])
    return Packing(
        selected[:, selected.shape[1] - queries :].flatten().nonzero()[:, 0],
        keys.flatten().nonzero()[:, 0],
        _bounds(query_counts[query_counts > 0]),
        _bounds(key_counts[key_counts > 0]),
        int(query_counts.max()),
        int(key_counts.max()),
        window,
    )


def _bounds(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _aligned(packing: Packing, behind: Tensor, window: int) -> Packing:
    """Padding queries under a window: one that is `behind` the last token sees the last `window - behind` tokens.

    The kernel counts the window from a sequence's last query, so the last queries of all sequences must be equally far
    behind the last token. Shorter sequences are filled up with copies of their last query, whose results are dropped.
    """
    assert packing.queries is not None
    lengths = packing.query_bounds.diff().long()
    starts, ends = packing.query_bounds[:-1].long(), packing.query_bounds[1:].long() - 1
    furthest = int(behind.max())
    filled = lengths + furthest - behind[ends]
    bounds = _bounds(filled)
    index = torch.arange(int(filled.sum()), device=behind.device) - bounds[:-1].long().repeat_interleave(filled)
    last = ends.repeat_interleave(filled)
    longest = int(filled.max())
    return Packing(
        packing.queries[torch.minimum(starts.repeat_interleave(filled) + index, last)],
        packing.keys,
        bounds,
        packing.key_bounds,
        longest,
        max(packing.max_keys, longest),  # a bound below the queries would be cut to it, and hide keys from the first
        (window - 1 - furthest, -1),
        valid=index < lengths.repeat_interleave(filled),
    )


@functools.cache
def _groups_heads() -> bool:
    """Whether this torch takes fewer key-value heads than query heads, as 2.12 and later do."""
    from torch.nn.attention import varlen as flash

    return "enable_gqa" in inspect.signature(flash.varlen_attn).parameters


def varlen(request: Request) -> tuple[Tensor, Tensor | None]:
    """Pack the tokens, call torch, and put each result back where its query was: out (B, H, T, D), lse (B, H, T)."""
    # torch's module imports its compiler, which takes seconds.
    from torch.nn.attention import varlen as flash

    batch, heads, queries, head_dim = request.q.shape
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], head_dim) for x in (request.q, request.k, request.v))
    options: dict[str, Any] = {}
    if heads != k.shape[1] and _groups_heads():
        options["enable_gqa"] = True
    elif heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    out = q.new_zeros(q.shape)
    lse = torch.full((batch * queries, heads), float("-inf"), dtype=torch.float32, device=q.device)
    for packing in packings(request.mask, batch, queries, request.keys, q.device):
        part, part_lse = flash.varlen_attn(
            q if packing.queries is None else q[packing.queries],
            k if packing.keys is None else k[packing.keys],
            v if packing.keys is None else v[packing.keys],
            packing.query_bounds,
            packing.key_bounds,
            packing.max_queries,
            packing.max_keys,
            return_aux=flash.AuxRequest(lse=True),
            scale=request.scale,
            window_size=packing.window,
            **options,
        )
        part_lse = part_lse.mT
        if packing.queries is None:
            out, lse = part, part_lse
            continue
        index = packing.queries
        if packing.valid is not None:
            index, part, part_lse = index[packing.valid], part[packing.valid], part_lse[packing.valid]
        out, lse = out.index_copy(0, index, part), lse.index_copy(0, index, part_lse.to(lse.dtype))
    out = out.view(batch, queries, heads, head_dim).transpose(1, 2)
    return out, lse.view(batch, queries, heads).transpose(1, 2) if request.with_lse else None


def _unsupported_reason(request: Request) -> str | None:
    size, gradient = request.q.shape[3], request.wants_gradient
    if size % 8 or size > 256:
        return f"it supports head sizes that are a multiple of 8 up to 256, not {size}"
    if request.scale <= 0:
        return "flash attention supports only positive scales"
    if request.with_lse and gradient:
        return "its backward drops the gradient of the log-sum-exp"
    if request.q.is_cuda:
        if torch.version.hip is not None:
            return "its log-sum-exp has another layout on ROCm"
        capability = torch.cuda.get_device_capability(request.q.device)
        if capability < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer"
        if gradient and 192 < size <= 224 and ((8, 6) <= capability <= (8, 9) or capability[0] == 12):
            return "its backward of head sizes from 200 to 224 does not fit this GPU"
    if request.mask.has_padding_holes(within_documents=True):
        return "there is padding between the tokens of a sequence"
    return None


KERNEL = Kernel(
    name="varlen",
    summary="torch's variable-length flash attention: windows, documents, padding, chunks, on a GPU in 16 bits",
    run=varlen,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    unsupported_reason=_unsupported_reason,
)
