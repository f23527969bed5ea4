r"""Attention by tiles of queries, each against only the keys that it can see: O(N * window) on any device.

For a tile with the queries q and each part (k, v) of its keys, all in a core's cache:

    forward     s = q k^T,  hidden keys -inf;   m' = max(m, rowmax s);   p = 2^(s - m')
                l = l 2^(m - m') + rowsum p;    o = o 2^(m - m') + p v;  at the end out = o / l, lse = m + log2 l
    backward    p = 2^(q k^T - lse);   dv += p^T do;   ds = p (do v^T - rowsum(do out) + dlse)
                dq += ds k;   dk += ds^T q

(FlashAttention, arXiv 2205.14135, sections 3.1 and 3.2.) The backward is written by hand and saves only q, k, v, out
and lse. Exponentials are in base 2, about four times faster on a CPU. The query heads of a group are rows of one matrix
product over the same keys. Scores are in float32 or wider. With 16-bit inputs the other products are rounded to 16
bits, do v^T too, so that dq and dk have 1.6 times the error of kernel `native`. Tiles share a few buffers for all
intermediate tensors: on a CPU, fresh memory costs more than the arithmetic on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zebra.kernels.request import Kernel, Mask, Request
from zebra.kernels.tiles import COLUMNS, Tile, Tiles

_LOG2E = math.log2(math.e)
_BLOCKS = (64, 128, 256)
"""Queries in a tile: with fewer, fewer masked scores are computed; with more, the products are faster."""
_PART = 2048
"""Keys of a tile that are computed at a time, at most."""
_SCORES_AT_ONCE = 1 << 20
"""Scores computed at a time on a CPU: with fewer, more calls are needed; more do not fit its caches."""
_SPAN = 1024
"""Queries whose vectors are gathered into rows at a time."""


class _Walk:
    """The order of the work: which heads are computed together, in which spans of tiles, and the shared buffers."""

    def __init__(self, q: Tensor, k: Tensor, mask: Mask, slopes: Tensor | None):
        self.q, self.wide = q, torch.promote_types(q.dtype, torch.float32)
        self.heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.slopes = None if slopes is None else slopes.to(self.wide).view(-1, self.group, 1, 1) * _LOG2E
        small, middle, large = _BLOCKS
        if mask.window is None:
            block = large if mask.documents is None else middle
        else:
            block = small if self.wide == q.dtype or mask.window <= 128 else middle
        self.tiles = Tiles(mask, q.shape[0], q.shape[2], k.shape[2], block=block, part=_PART, group=self.group)
        reach = min(k.shape[2], _PART, k.shape[2] if mask.window is None else mask.window - 1 + block + COLUMNS)
        at_once = _SCORES_AT_ONCE if q.device.type == "cpu" else _SCORES_AT_ONCE << 8
        self.head_groups = -(-self.heads // max(1, at_once // (self.group * block * reach)))
        self.span = max(1, _SPAN // block)
        self.longest = k.shape[2]
        if mask.window is not None:
            self.longest = min(k.shape[2], mask.window - 1 + self.span * block + COLUMNS)
        self.compact = q.dtype != self.wide or _reduced_float32()
        self._room = -(-self.heads // self.head_groups) * self.group * block * reach
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def head_slices(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield a batch entry, the key-value heads that are computed together, and their query heads."""
        for entry in range(self.q.shape[0]):
            for index in range(self.head_groups):
                first, last = (self.heads * edge // self.head_groups for edge in (index, index + 1))
                yield entry, slice(first, last), slice(first * self.group, last * self.group)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory of this shape, shared by all uses of the name."""
        view = self._views.get((name, shape))
        if view is None:
            size, flat = math.prod(shape), self._buffers.get(name)
            if flat is None or flat.numel() < size:
                room = max(size, self._room if name in _SCORES else 0)
                flat = self._buffers[name] = torch.empty(room, dtype=dtype or self.wide, device=self.q.device)
            view = self._views[name, shape] = flat[:size].view(shape)
        return view

    def gather(self, name: str, states: Tensor, tiles: int, dtype: torch.dtype) -> Tensor:
        """A span's query heads (heads * g, tiles * n, D) as rows of key-value heads: (tiles, heads, g * n, D)."""
        count, length, size = states.shape
        shape = (tiles, count // self.group, self.group, length // tiles, size)
        rows = self.buffer(name, *shape, dtype=dtype).copy_(_by_tile(states, self.group, tiles))
        return rows.view(*shape[:2], -1, size)

    def scatter(self, rows: Tensor, into: Tensor) -> None:
        """The reverse: rows (tiles, heads, g * n, D) into a span's query heads (heads * g, tiles * n, D)."""
        states = _by_tile(into, self.group, rows.shape[0])
        states.copy_(rows.view(states.shape))

    def narrowed(self, weights: Tensor) -> Tensor:
        """The weights (heads, g * n, m) in the dtype of the inputs, for the products with values and keys."""
        if self.q.dtype == self.wide:
            return weights
        return self.buffer("narrow", *weights.shape, dtype=self.q.dtype).copy_(weights)

    def across(self, name: str, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys or values (heads, m, D) as the transposed side of a product: (heads, D, m)."""
        if self.compact or states.dtype != dtype:  # oneDNN copies what is not contiguous, slowly
            states = self.buffer(name, *states.shape, dtype=dtype).copy_(states)
        return states.mT

    def scores(self, q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
        """A part's scores (heads, g * n, m) in base 2, without ALiBi.

        q: (heads, g * n, D), wide and scaled. k: (heads, m, D).
        """
        scores = torch.bmm(q, self.across("k", k, self.wide), out=self.buffer("scores", *q.shape[:2], k.shape[1]))
        if softcap is not None:
            scores.div_(softcap * _LOG2E).tanh_().mul_(softcap * _LOG2E)
        return scores

    def hide(self, scores: Tensor, tile: Tile, heads: slice) -> None:
        """Lower the scores (heads, g * n, m) by ALiBi's m_h (i - j), and put -inf where a query sees no key."""
        if self.slopes is not None:
            by_head = scores.unflatten(1, (self.group, -1))
            by_head.addcmul_(self.slopes[heads], self.tiles.distances(tile, scores), value=-1)
        self.tiles.hide(scores, tile)

    def product(self, into: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, add: bool = True) -> None:
        """into += scale * a b, or into = a b; the sum in the dtype of `into`."""
        if into.dtype == a.dtype:
            torch.baddbmm(into, a, b, alpha=scale, out=into) if add else torch.bmm(a, b, out=into)
            return
        product = torch.bmm(a, b, out=self.buffer("product", *into.shape, dtype=a.dtype))
        into.add_(product, alpha=scale) if add else into.copy_(product)


def _reduced_float32() -> bool:
    """Whether torch may compute float32 products in a lower precision; True if torch cannot tell.

    It cannot where that was set by the newer `torch.backends...fp32_precision`.
    """
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return True


_SCORES = ("scores", "narrow", "ds", "wide ds")


def _by_tile(states: Tensor, group: int, tiles: int) -> Tensor:
    """(heads * g, tiles * n, D) as a view (tiles, heads, g, n, D)."""
    return states.unflatten(1, (tiles, -1)).unflatten(0, (-1, group)).permute(2, 0, 1, 3, 4)


class _Sum:
    """A gradient of keys or values (heads, S, D), summed over tiles in a sliding wide buffer, then written.

    No span reads keys before the first key of the previous span, so the sums of earlier keys are complete.
    """

    def __init__(self, walk: _Walk, name: str, into: Tensor):
        self.into, self.start = into, 0
        self.sums = walk.buffer(name, into.shape[0], walk.longest, into.shape[2]).zero_()

    def keys(self, lo: int, hi: int) -> Tensor:
        """The sum for the keys [lo, hi), (heads, hi - lo, D), to be added to."""
        if hi > self.start + self.sums.shape[1]:
            self.write(lo)
            rest = self.sums[:, lo - self.start :].clone()
            self.sums[:, : rest.shape[1]] = rest
            self.sums[:, rest.shape[1] :] = 0
            self.start = lo
        return self.sums[:, lo - self.start : hi - self.start]

    def write(self, end: int) -> None:
        """Write the sums of the keys before `end`; 0 where no tile saw a key."""
        last = min(end, self.start + self.sums.shape[1])
        self.into[:, self.start : last] = self.sums[:, : last - self.start]
        self.into[:, last:end] = 0


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
        slopes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        walk = _Walk(q, k, mask, slopes)
        out = torch.empty_like(q) if v.shape[3] == q.shape[3] else q.new_empty(*q.shape[:3], v.shape[3])
        lse = torch.empty(*q.shape[:3], 1, dtype=walk.wide, device=q.device)
        for entry, kv_heads, heads in walk.head_slices():
            for span in walk.tiles.spans(entry, walk.span):
                tiles, queries = len(span.tiles), slice(span.s, span.e)
                rows = walk.gather("q", q[entry, heads, queries], tiles, walk.wide).mul_(scale * _LOG2E)
                mixed, total, peak = (
                    walk.buffer(name, *rows.shape[:3], size)
                    for name, size in (("mixed", v.shape[3]), ("total", 1), ("peak", 1))
                )
                for tile, *columns in zip(span.tiles, rows, mixed, total, peak, strict=True):
                    _tile(walk, tile, kv_heads, k[entry, kv_heads], v[entry, kv_heads], columns, softcap)
                walk.scatter(mixed.div_(total.clamp(min=torch.finfo(walk.wide).tiny)), out[entry, heads, queries])
                walk.scatter(total.log2_().add_(peak), lse[entry, heads, queries])
        lse = lse.squeeze(-1).div_(_LOG2E)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.softcap, ctx.slopes = mask, scale, softcap, slopes
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        request = Request(q, k, v, ctx.mask, ctx.scale, ctx.softcap, ctx.slopes)
        return *_gradients(request, out, lse, grad_out, grad_lse), None, None, None, None


def _gradients(
    request: Request, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv. Under a softcap c, ds has the factor 1 - (s / c)^2, as s = c tanh(scale q k^T / c)."""
    q, k, v = request.q, request.k, request.v
    walk = _Walk(q, k, request.mask, request.slopes)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        for entry, kv_heads, heads in walk.head_slices():
            sums = [_Sum(walk, name, grad[entry, kv_heads]) for name, grad in (("dk", dk), ("dv", dv))]
            for span in walk.tiles.spans(entry, walk.span):
                tiles, queries = len(span.tiles), slice(span.s, span.e)
                rows = walk.gather("q", q[entry, heads, queries], tiles, q.dtype)
                do = walk.gather("do", grad_out[entry, heads, queries], tiles, q.dtype)
                weighted = walk.gather("out", out[entry, heads, queries], tiles, walk.wide).mul_(do)
                delta = weighted.sum(-1, keepdim=True)
                delta -= walk.gather("dlse", grad_lse[entry, heads, queries, None], tiles, walk.wide)
                peak = walk.gather("lse", lse[entry, heads, queries, None], tiles, walk.wide).mul_(_LOG2E)
                peak.masked_fill_(peak.isneginf(), 0.0)
                span_dq = walk.buffer("dq", *rows.shape)
                sides = [x[entry, kv_heads, span.lo : span.hi] for x in (k, v)]
                sides += [total.keys(span.lo, span.hi) for total in sums]
                for tile, *columns in zip(span.tiles, rows, do, delta, peak, span_dq, strict=True):
                    _tile_backward(walk, tile, kv_heads, span.lo, sides, columns, request)
                walk.scatter(span_dq.mul_(request.scale), dq[entry, heads, queries])
            for total in sums:
                total.write(k.shape[2])
    return dq, dk, dv


def _tile(
    walk: _Walk, tile: Tile, heads: slice, k: Tensor, v: Tensor, columns: list[Tensor], softcap: float | None
) -> None:
    """Fill in a tile's sum of weighted values (heads, g * n, D), and each row's sum of weights and peak score (.., 1).

    k, v: (heads, S, D). columns: the tile's rows of queries (heads, g * n, D), and the three outputs.
    """
    rows, mixed, total, peak = columns
    lowest = torch.finfo(walk.wide).min
    parts = list(walk.tiles.parts(tile))
    if not parts:
        for column in (mixed, total, peak):
            column.zero_()
    for part in parts:
        seen = slice(part.lo, part.hi)
        scores = walk.scores(rows, k[:, seen], softcap)
        walk.hide(scores, part, heads)
        # A row without a visible key is all -inf. The lower bound avoids inf - inf, and its sum stays 0.
        if part.lo == tile.lo:
            torch.amax(scores, dim=-1, keepdim=True, out=peak).clamp_(min=lowest)
            torch.sum(scores.sub_(peak).exp2_(), dim=-1, keepdim=True, out=total)
            walk.product(mixed, walk.narrowed(scores), v[:, seen], add=False)
            continue
        highest = torch.maximum(scores.amax(dim=-1, keepdim=True), peak)
        decay = peak.sub_(highest).exp2_()
        total.mul_(decay).add_(scores.sub_(highest).exp2_().sum(dim=-1, keepdim=True))
        walk.product(mixed.mul_(decay), walk.narrowed(scores), v[:, seen])
        peak.copy_(highest)


def _tile_backward(
    walk: _Walk, tile: Tile, heads: slice, start: int, sides: list[Tensor], columns: list[Tensor], request: Request
) -> None:
    """Fill in a tile's dq, in the wide dtype and before the scale; add its dk and dv to their sums.

    sides: k, v and the sums of dk and dv, each (heads, keys of the span, D) from the key `start` on.
    columns: q, do and dq (heads, g * n, D), delta and peak (heads, g * n, 1).
    """
    queries, do, delta, peak, dq = columns
    rows = walk.buffer("rows", *queries.shape).copy_(queries).mul_(request.scale * _LOG2E)
    if tile.lo == tile.hi:
        dq.zero_()
    for part in walk.tiles.parts(tile):
        k, v, dk, dv = (side[:, part.lo - start : part.hi - start] for side in sides)
        weights = walk.scores(rows, k, request.softcap)
        slope = None if request.softcap is None else weights.div(request.softcap * _LOG2E).square_().neg_().add_(1)
        walk.hide(weights, part, heads)
        weights.sub_(peak).exp2_()
        walk.product(dv, walk.narrowed(weights).mT, do)
        ds = torch.bmm(do, walk.across("v", v, do.dtype), out=walk.buffer("ds", *weights.shape, dtype=do.dtype))
        ds = ds if ds.dtype == walk.wide else walk.buffer("wide ds", *ds.shape).copy_(ds)
        ds.sub_(delta).mul_(weights)
        if slope is not None:
            ds.mul_(slope)
        ds = walk.narrowed(ds)
        walk.product(dq, ds, k, add=part.lo > tile.lo)
        walk.product(dk, ds.mT, queries, scale=request.scale)


def banded(request: Request) -> tuple[Tensor, Tensor | None]:
    """Run the tiles without autocast, which would round the float32 scores: out (B, H, T, D), lse (B, H, T)."""
    inputs = request.q, request.k, request.v
    with torch.autocast(request.q.device.type, enabled=False):
        out, lse = _Banded.apply(*inputs, request.mask, request.scale, request.softcap, request.slopes)
    return out, lse if request.with_lse else None


def _unsupported_reason(request: Request) -> str | None:
    if request.slopes is not None and request.slopes.requires_grad and torch.is_grad_enabled():
        return "it computes no gradient of ALiBi's slopes"
    return None


KERNEL = Kernel(
    name="banded",
    summary="tiles of queries, O(N * window): windows, documents, padding, chunks, softcap, ALiBi",
    run=banded,
    softcap=True,
    slopes=True,
    value_sizes=True,
    unsupported_reason=_unsupported_reason,
    gradients=_gradients,
)
