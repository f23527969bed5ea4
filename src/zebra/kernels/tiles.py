r"""The tiles of kernel `banded`: the keys that each tile of queries is computed against, and the mask inside it.

keys     lo           hi            A tile of n queries of one sequence is computed against the keys [lo, hi) that
queries  [\ . . . . . \   ]         any of them sees, in parts that fit a core's cache. Only the two triangles at its
  tile   [  \ . . . . . \ ]         edges need a mask, and documents and padding where they cut through the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra import masks
from zebra.kernels.request import Mask

COLUMNS = 16
"""Under a window, a tile's keys are rounded up to a multiple of this: whole vectors make products a tenth faster."""


class Tile(NamedTuple):
    """The queries [s, e) of a batch entry, computed against the keys [lo, hi); lo = hi where they see none."""

    entry: int
    s: int
    e: int
    lo: int
    hi: int


class Span(NamedTuple):
    """Consecutive tiles of one size, with all their queries [s, e) and keys [lo, hi)."""

    tiles: list[Tile]
    s: int
    e: int
    lo: int
    hi: int


class Tiles:
    """The tiles of each batch entry of a request, whose `queries` are the last of its `keys`.

    Args:
        block: queries in a tile.
        part: keys that are computed at a time, at most.
        group: query heads of a key-value head; the scores of a tile have `group` times as many rows as it has queries.
    """

    def __init__(self, mask: Mask, batch: int, queries: int, keys: int, *, block: int, part: int, group: int = 1):
        self.mask, self.queries, self.keys = mask, queries, keys
        self.block, self.part, self.group = block, part, group
        self.offset = keys - queries
        self._triangles: dict[tuple[int, int, int], Tensor] = {}
        device = next((x.device for x in (mask.keys, mask.documents) if x is not None), torch.device("cpu"))
        # The first key of each tile's top and bottom query, by documents and padding alone.
        first = replace(mask, window=None).key_ranges(queries, keys, device)[0].expand(batch, -1)
        edges = torch.arange(0, queries, block, device=device)
        self._top = first[:, edges].tolist()
        self._bottom = first[:, (edges + block).clamp(max=queries) - 1].tolist()
        self._padding = None if mask.keys is None else pad((~mask.keys).cumsum(dim=1), (1, 0)).tolist()

    def of(self, entry: int) -> Iterator[Tile]:
        """The tiles of a batch entry in the order of their queries; neither bound of their keys decreases."""
        window = self.mask.window
        for s, lo in zip(range(0, self.queries, self.block), self._top[entry], strict=True):
            e = min(self.queries, s + self.block)
            if window is not None:
                edge = self.offset + s - window + 1
                lo = max(lo, edge - -(self.offset + e - edge) % COLUMNS)  # or a little before, in whole `COLUMNS`
            yield Tile(entry, s, e, min(lo, self.offset + e), self.offset + e)

    def spans(self, entry: int, most: int) -> Iterator[Span]:
        """The tiles of a batch entry, at most `most` at a time; a shorter last tile is a span of its own."""
        tiles = list(self.of(entry))
        whole = len(tiles) - (self.queries % self.block > 0)
        for edge in [*range(0, whole, most), *range(whole, len(tiles))]:
            span = tiles[edge : min(edge + most, whole)] or tiles[edge:]
            yield Span(span, span[0].s, span[-1].e, span[0].lo, span[-1].hi)

    def parts(self, tile: Tile) -> Iterator[Tile]:
        """Split a tile's keys into equal parts of at most `part`."""
        entry, s, e, lo, hi = tile
        count = -(-(hi - lo) // self.part)
        for index in range(count):
            yield Tile(entry, s, e, *(lo + (hi - lo) * edge // count for edge in (index, index + 1)))

    def hide(self, scores: Tensor, tile: Tile) -> None:
        """Set the scores of masked keys to -inf. scores: (heads, g * (e - s), hi - lo), changed in place."""
        _, s, e, lo, hi = tile
        first, last = self.offset + s - lo, self.offset + e - 1 - lo  # the tile's own keys, counted from lo
        after = max(0, first)
        if after < hi - lo:
            scores[..., after:] += self._triangle(e - s, hi - lo - after, first - after, scores)
        window = self.mask.window
        if window is not None and last >= window:
            edge = min(hi - lo, last - window + 1)
            scores[..., :edge] += self._triangle(e - s, edge, first, scores)
        seen = self._cut(tile)
        if seen is not None:
            scores.unflatten(1, (self.group, -1)).masked_fill_(~seen, float("-inf"))

    def distances(self, tile: Tile, like: Tensor) -> Tensor:
        """i - j of a tile, (e - s, hi - lo), in the dtype of `like`."""
        _, s, e, lo, hi = tile
        i = torch.arange(self.offset + s, self.offset + e, device=like.device)
        return (i[:, None] - torch.arange(lo, hi, device=like.device)).to(like.dtype)

    def _cut(self, tile: Tile) -> Tensor | None:
        """What documents and padding leave visible, (e - s or 1, hi - lo); None if they do not cut through the tile."""
        entry, s, e, lo, hi = tile
        seen: Tensor | None = None
        documents, keys = self.mask.documents, self.mask.keys
        if documents is not None and lo < self._bottom[entry][s // self.block]:
            of_queries = documents[entry, self.offset + s : self.offset + e, None]
            seen = masks.same_document(of_queries, documents[entry, None, lo:hi])
        if self._padding is not None and keys is not None and self._padding[entry][lo] < self._padding[entry][hi]:
            seen = keys[entry, None, lo:hi] if seen is None else seen & keys[entry, None, lo:hi]
        return seen

    def _triangle(self, rows: int, columns: int, first: int, like: Tensor) -> Tensor:
        """-inf where the mask hides column `c` from row `r`, whose own column is `first + r`; 0 elsewhere.

        Repeated for each head of the group: (g * rows, columns).
        """
        key = (rows, columns, first)
        if key not in self._triangles:
            i = torch.arange(rows, device=like.device)[:, None] + first
            j = torch.arange(columns, device=like.device)[None, :]
            window = self.mask.window
            seen = masks.causal(i, j) if window is None else masks.within(i, j, window)
            zeros = torch.zeros(rows, columns, dtype=like.dtype, device=like.device)
            self._triangles[key] = zeros.masked_fill_(~seen, float("-inf")).repeat(self.group, 1)
        return self._triangles[key]
