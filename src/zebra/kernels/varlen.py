"""Attention on a GPU by torch's own variable-length flash attention: windows, packed documents, padding, chunks.

    row 0   . . a a a a | b b b      documents a and b after two tokens of padding
    row 1   c c c c c c c . .        padding after c
    call 1  a a a a b b b c c c c c c c     with the bounds 0 4 7 14: only real tokens, one band below each diagonal
    call 2  the padded queries after c, which see c and are not seen

The kernel aligns queries and keys of a sequence at their last token (FlashAttention 2.1, arXiv 2307.08691), as
`attend` does, so chunks and decode need no mask of their own. Its log-sum-exp is natural, float32, (H, tokens).

Everything but the one call of torch is tested on a CPU, by a stand-in for that call. It has not yet been run on a GPU.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra.kernels.request import Kernel, Mask, Request


@dataclass(frozen=True)
class Packing:
    """The sequences of one call, end to end.

    Attributes:
        rows: which of the B * T queries, None for all in order; columns: which of the B * S keys.
        row_bounds: (sequences + 1) int32, where each sequence's queries begin and end; column_bounds: its keys.
        longest_rows: at least the queries of any sequence; longest_columns: at least its keys.
        window: (left, right) of the last query: how many keys before and after its own it sees, -1 for all.
        counts: which results count; None for all.
    """

    rows: Tensor | None
    columns: Tensor | None
    row_bounds: Tensor
    column_bounds: Tensor
    longest_rows: int
    longest_columns: int
    window: tuple[int, int]
    counts: Tensor | None = None


def packings(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> list[Packing]:
    """The calls that together give every query which sees a key its result, each query once.

    The padding of a sequence stands before or after its tokens, not between them (`Mask.has_padding_holes`).
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
    rows = has_query & real
    if bool(rows.any()):
        result.append(_pack(real, number, rows, queries, (left, 0)))
    last = torch.where(real, j, -1).cummax(dim=1).values  # the last real token so far
    behind = j - last
    tail = has_query & ~real & (last >= starts)
    if mask.window is not None:
        tail &= behind < mask.window
    if bool(tail.any()):
        packing = _pack(real, number, tail, queries, (-1, -1))
        result.append(packing if mask.window is None else _aligned(packing, behind[tail], mask.window))
    return result


def _pack(real: Tensor, number: Tensor, rows: Tensor, queries: int, window: tuple[int, int]) -> Packing:
    """The queries `rows` (B, S) against all real keys of the sequences that they belong to."""
    of_rows = torch.bincount(number[rows])
    of_rows = pad(of_rows, (0, number.numel() - len(of_rows)))
    columns = real & (of_rows[number] > 0)
    of_columns = torch.bincount(number[columns])
    row_bounds, column_bounds = _bounds(of_rows[of_rows > 0]), _bounds(of_columns[of_columns > 0])
    return Packing(
        rows[:, rows.shape[1] - queries :].flatten().nonzero()[:, 0],
        columns.flatten().nonzero()[:, 0],
        row_bounds,
        column_bounds,
        int(of_rows.max()),
        int(of_columns.max()),
        window,
    )


def _bounds(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _aligned(packing: Packing, behind: Tensor, window: int) -> Packing:
    """Padded queries under a window: each `behind` the last token sees `window - behind` tokens less.

    The kernel counts the window from the end of a sequence's queries, so all must end equally far behind their last
    token: the shorter are filled up with copies of their last query, whose results do not count.
    """
    assert packing.rows is not None
    lengths = packing.row_bounds.diff().long()
    ends = packing.row_bounds[1:].long() - 1
    furthest = int(behind.max())
    filled = lengths + furthest - behind[ends]
    bounds = _bounds(filled)
    place = torch.arange(int(filled.sum()), device=behind.device) - bounds[:-1].long().repeat_interleave(filled)
    counts = place < lengths.repeat_interleave(filled)
    first = packing.row_bounds[:-1].long().repeat_interleave(filled)
    rows = packing.rows[torch.minimum(first + place, ends.repeat_interleave(filled))]
    longest = int(filled.max())
    # A bound below the queries would be cut to it, and hide keys from the first of them.
    longest_columns = max(packing.longest_columns, longest)
    window_left = window - 1 - furthest
    return Packing(
        rows, packing.columns, bounds, packing.column_bounds, longest, longest_columns, (window_left, -1), counts
    )


@functools.cache
def _groups_heads() -> bool:
    """Whether this torch takes fewer key-value heads than query heads (2.12 and later say so)."""
    from torch.nn.attention import varlen as flash

    return "enable_gqa" in inspect.signature(flash.varlen_attn).parameters


def varlen(request: Request) -> tuple[Tensor, Tensor | None]:
    """Pack, call torch, and put each result back where its query was."""
    # torch's module brings its compiler along, which takes seconds to import.
    from torch.nn.attention import varlen as flash

    batch, heads, queries, size = request.q.shape
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], size) for x in (request.q, request.k, request.v))
    options: dict[str, Any] = {}
    if heads != k.shape[1] and _groups_heads():
        options["enable_gqa"] = True
    elif heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    out = q.new_zeros(q.shape)
    lse = torch.full((batch * queries, heads), float("-inf"), dtype=torch.float32, device=q.device)
    for packing in packings(request.mask, batch, queries, request.keys, q.device):
        part, part_lse = flash.varlen_attn(
            q if packing.rows is None else q[packing.rows],
            k if packing.columns is None else k[packing.columns],
            v if packing.columns is None else v[packing.columns],
            packing.row_bounds,
            packing.column_bounds,
            packing.longest_rows,
            packing.longest_columns,
            return_aux=flash.AuxRequest(lse=True),
            scale=request.scale,
            window_size=packing.window,
            **options,
        )
        part_lse = part_lse.mT
        if packing.rows is None:
            out, lse = part, part_lse
            continue
        rows = packing.rows
        if packing.counts is not None:
            rows, part, part_lse = rows[packing.counts], part[packing.counts], part_lse[packing.counts]
        out, lse = out.index_copy(0, rows, part), lse.index_copy(0, rows, part_lse.to(lse.dtype))
    out = out.view(batch, queries, heads, size).transpose(1, 2)
    return out, lse.view(batch, queries, heads).transpose(1, 2) if request.with_lse else None


def _unsupported_reason(request: Request) -> str | None:
    size, gradient = request.q.shape[3], request.wants_gradient
    if size % 8 or size > 256:
        return f"it takes head sizes that are a multiple of 8 up to 256, not {size}"
    if request.scale <= 0:
        return "flash attention takes positive scales only"
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
        return "padding stands between the tokens of a sequence"
    return None


KERNEL = Kernel(
    name="varlen",
    summary="torch's variable-length flash attention: windows, documents, padding, chunks, on a GPU in 16 bits",
    run=varlen,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    unsupported_reason=_unsupported_reason,
)
