r"""Attention by tiles of queries, each against only the keys that it can see: O(N * window) on any device.

    keys     lo           hi            A tile of b queries sees the keys [lo, hi). Only the two triangles at its
    queries  [\ . . . . . \   ]         edges need a mask; where documents or padding are given, the tile's own mask
      tile   [  \ . . . . . \ ]         is built and nothing larger.

The backward is written by hand: it saves q, k, v, out and lse, and computes each tile's weights again
(FlashAttention's recomputation, arXiv 2205.14135, section 3.1). Exponentials are taken in base 2, which is about
four times faster on a CPU, scores in float32 or wider; the heads of a query group become rows of one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zebra import masks
from zebra.kernels.request import Kernel, Mask, Request

_LOG2E = math.log2(math.e)
_SCORES_AT_ONCE = 1 << 24


class _Tiles:
    """The walk over tiles: where each one's keys begin and end, and the mask that it needs."""

    def __init__(self, mask: Mask, batch: int, heads: int, group: int, queries: int, keys: int, device: torch.device):
        self.mask, self.batch, self.heads, self.group = mask, batch, heads, group
        self.queries, self.keys, self.device = queries, keys, device
        self.offset = keys - queries
        block = 64 if mask.window is not None and mask.window <= 128 else 128
        reach = keys if mask.window is None else min(keys, mask.window + block)
        self.block = max(16, min(block, _SCORES_AT_ONCE // max(1, batch * heads * group * reach)))
        self.starts = self._document_starts()
        self.triangles: dict[tuple[int, int, int], Tensor] = {}

    def _document_starts(self) -> list[int] | None:
        """For each tile the first key of the documents that its first query may belong to, over the batch."""
        documents = self.mask.documents
        if documents is None:
            return None
        index = torch.arange(self.keys, device=self.device)
        first = torch.ones_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.where(first, index, 0).cummax(dim=1).values.amin(dim=0)
        return [int(start) for start in starts[self.offset :: self.block].tolist()]

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(s, e, lo, hi): queries [s, e) against keys [lo, hi)."""
        for tile, s in enumerate(range(0, self.queries, self.block)):
            e = min(self.queries, s + self.block)
            lo = 0 if self.mask.window is None else max(0, self.offset + s - self.mask.window + 1)
            if self.starts is not None:
                lo = max(lo, self.starts[tile])
            yield s, e, lo, self.offset + e

    def hide(self, scores: Tensor, s: int, e: int, lo: int, hi: int) -> None:
        """Put -inf where a query of the tile sees no key. scores: (B * K, g * n, m), changed in place."""
        n, m = e - s, hi - lo
        tile = scores.view(-1, self.group, n, m)
        first = self.offset + s - lo
        tile[..., m - n :] += self._triangle(n, n, first - (m - n), scores)
        if self.mask.window is not None:
            edge = min(m, self.offset + e - self.mask.window - lo)
            if edge > 0:
                tile[..., :edge] += self._triangle(n, edge, first, scores)
        if self.mask.keys is not None or self.mask.documents is not None:
            i = torch.arange(self.offset + s, self.offset + e, device=self.device)
            j = torch.arange(lo, hi, device=self.device)
            visible = self.mask.visible(i, j)
            scores.view(self.batch, self.heads, self.group, n, m).masked_fill_(~visible.unsqueeze(2), float("-inf"))

    def _triangle(self, rows: int, columns: int, first: int, like: Tensor) -> Tensor:
        """-inf where the mask hides column `c` from row `r`, whose own column is `first + r`; 0 elsewhere."""
        key = (rows, columns, first)
        if key not in self.triangles:
            i = torch.arange(rows, device=self.device)[:, None] + first
            j = torch.arange(columns, device=self.device)[None, :]
            window = self.mask.window
            seen: Tensor = masks.causal(i, j) if window is None else masks.within(i, j, window)
            self.triangles[key] = torch.zeros(rows, columns, dtype=like.dtype, device=self.device).masked_fill_(
                ~seen, float("-inf")
            )
        return self.triangles[key]


def _scores(q: Tensor, k: Tensor, tile: tuple[int, int, int, int], softcap: float | None) -> Tensor:
    """The tile's scores in base 2, of all its keys. q (B * K, g, T, D) already scaled, k (B * K, S, D)."""
    s, e, lo, hi = tile
    scores = torch.bmm(q[:, :, s:e].reshape(q.shape[0], -1, q.shape[3]), k[:, lo:hi].mT)
    if softcap is not None:
        scores.div_(softcap * _LOG2E).tanh_().mul_(softcap * _LOG2E)
    return scores


def _slope(scores: Tensor, softcap: float | None) -> Tensor | None:
    """What a score changes by with the score before the cap: 1 - tanh^2. Before hidden keys are at -inf."""
    return None if softcap is None else scores.div(softcap * _LOG2E).square_().neg_().add_(1)


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        batch, query_heads, queries, size = q.shape
        heads, keys = k.shape[1], k.shape[2]
        group = query_heads // heads
        wide = torch.promote_types(q.dtype, torch.float32)
        tiles = _Tiles(mask, batch, heads, group, queries, keys, q.device)
        scaled = q.reshape(-1, group, queries, size).to(wide) * (scale * _LOG2E)
        k_wide, values = k.reshape(-1, keys, size).to(wide), v.reshape(-1, keys, size)
        out = torch.empty(batch * heads, group, queries, size, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch * heads, group, queries, dtype=wide, device=q.device)
        tiny = torch.finfo(wide).tiny
        for s, e, lo, hi in tiles:
            scores = _scores(scaled, k_wide, (s, e, lo, hi), softcap)
            tiles.hide(scores, s, e, lo, hi)
            # A row without a visible key has only -inf: the floor keeps it out of inf - inf, its sum stays 0.
            peak = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
            total = scores.sub_(peak).exp2_().sum(dim=-1, keepdim=True)
            mixed = torch.bmm(scores.to(v.dtype), values[:, lo:hi]) / total.clamp(min=tiny)
            out[:, :, s:e] = mixed.view(-1, group, e - s, size)
            lse[:, :, s:e] = (peak + total.log2()).view(-1, group, e - s)
        lse /= _LOG2E
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.softcap = mask, scale, softcap
        return out.view(batch, query_heads, queries, size), lse.view(batch, query_heads, queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """With P the weights: dv = P^T do, dS = P (do v^T - rowsum(do out) + dlse), dq = scale dS k, dk = scale dS^T q.

        Under a softcap c dS takes the factor 1 - (S / c)^2, as S = c tanh(scale q k^T / c).
        A key outside a tile's range gets nothing from it, so dk and dv are sums over the tiles that saw the key.
        """
        q, k, v, out, lse = ctx.saved_tensors
        mask, scale = ctx.mask, ctx.scale
        batch, query_heads, queries, size = q.shape
        heads, keys = k.shape[1], k.shape[2]
        group, dtype = query_heads // heads, q.dtype
        wide = lse.dtype
        tiles = _Tiles(mask, batch, heads, group, queries, keys, q.device)
        with torch.autocast(q.device.type, enabled=False):
            rows = q.reshape(-1, group, queries, size)
            scaled = rows.to(wide) * (scale * _LOG2E)
            k_flat, v_flat = k.reshape(-1, keys, size), v.reshape(-1, keys, size)
            k_wide, v_wide = k_flat.to(wide), v_flat.to(wide)
            grad = grad_out.reshape(-1, group, queries, size)
            delta = (grad.to(wide) * out.to(wide)).sum(dim=-1)
            delta -= grad_lse.reshape(delta.shape)
            lse2 = (lse * _LOG2E).masked_fill_(lse.isneginf(), 0.0)
            dq = torch.empty_like(scaled)
            dk, dv = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
            for s, e, lo, hi in tiles:
                weights = _scores(scaled, k_wide, (s, e, lo, hi), ctx.softcap)
                slope = _slope(weights, ctx.softcap)
                tiles.hide(weights, s, e, lo, hi)
                weights.sub_(lse2[:, :, s:e].reshape(-1, group * (e - s), 1)).exp2_()
                do = grad[:, :, s:e].reshape(-1, group * (e - s), size)
                dv[:, lo:hi] += torch.bmm(weights.to(dtype).mT, do)
                ds = torch.bmm(do.to(wide), v_wide[:, lo:hi].mT)
                ds.sub_(delta[:, :, s:e].reshape(-1, group * (e - s), 1)).mul_(weights)
                if slope is not None:
                    ds.mul_(slope)
                ds = ds.to(dtype)
                dq[:, :, s:e] = torch.bmm(ds, k_flat[:, lo:hi]).view(-1, group, e - s, size)
                dk[:, lo:hi] += torch.bmm(ds.mT, rows[:, :, s:e].reshape(-1, group * (e - s), size))
        dq *= scale
        dk *= scale
        return dq.to(dtype).view_as(q), dk.to(dtype).view_as(k), dv.to(dtype).view_as(v), None, None, None


def banded(request: Request) -> tuple[Tensor, Tensor | None]:
    """Run the tiles outside autocast, which would cast the float32 scores down."""
    with torch.autocast(request.q.device.type, enabled=False):
        out, lse = _Banded.apply(request.q, request.k, request.v, request.mask, request.scale, request.softcap)
    return out, lse if request.with_lse else None


KERNEL = Kernel(
    name="banded",
    summary="tiles of queries, O(N * window): windows, documents, padding, chunks, softcap",
    run=banded,
    softcap=True,
)
