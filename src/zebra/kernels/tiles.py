r"""The walk of the tiled kernel: which keys each tile of queries is computed against, and what is hidden inside it.

keys     lo           hi            A tile of n queries of one row is computed against the keys [lo, hi) that any
queries  [\ . . . . . \   ]         of them sees, in parts that stay in a core's cache. Only the two triangles at
  tile   [  \ . . . . . \ ]         its edges need a mask; documents and padding where they cut through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zebra import masks
from zebra.kernels.request import Mask

COLUMNS = 16
"""Keys of a tile in a window come in so many: a row of scores is whole vectors, and products a tenth faster."""


class Tile(NamedTuple):
    """The queries [s, e) of a row against its keys [lo, hi); where they see none, lo = hi."""

    row: int
    s: int
    e: int
    lo: int
    hi: int


class Span(NamedTuple):
    """Tiles of one size that follow one another, their queries [s, e) and keys [lo, hi)."""

    tiles: list[Tile]
    s: int
    e: int
    lo: int
    hi: int


class Tiles:
    """The tiles of a request of `queries` against the last of `keys`, for each row of the batch.

    Args:
        block: queries of a tile.
        part: keys at a time, at most.
        group: query heads that are rows of one product; the scores of a tile have `group` times its queries as rows.
    """

    def __init__(self, mask: Mask, batch: int, queries: int, keys: int, *, block: int, part: int, group: int = 1):
        self.mask, self.queries, self.keys = mask, queries, keys
        self.block, self.part, self.group = block, part, group
        self.offset = keys - queries
        self._triangles: dict[tuple[int, int, int], Tensor] = {}
        self._starts = None if mask.documents is None else _document_starts(mask.documents)
        self._hidden = None if mask.keys is None else _hidden_before(mask.keys)
        self._first = [0] * batch if mask.keys is None else _first_real(mask.keys)

    def of(self, row: int) -> Iterator[Tile]:
        """The tiles of a row in the order of their queries; neither end of their keys ever falls."""
        window = self.mask.window
        for s in range(0, self.queries, self.block):
            e = min(self.queries, s + self.block)
            first = self.offset + s
            lo = self._first[row] if window is None else max(self._first[row], self._rounded(first - window + 1, e))
            if self._starts is not None:
                lo = max(lo, self._starts[row][first])
            yield Tile(row, s, e, min(lo, self.offset + e), self.offset + e)

    def _rounded(self, lo: int, e: int) -> int:
        """`lo`, or a little before it, so that the keys up to the tile's last query are whole `COLUMNS`."""
        keys = self.offset + e - lo
        return lo - -keys % COLUMNS

    def spans(self, row: int, most: int) -> Iterator[Span]:
        """The tiles of a row, at most `most` at a time; a shorter last one alone."""
        tiles = list(self.of(row))
        whole = len(tiles) - (self.queries % self.block > 0)
        for edge in [*range(0, whole, most), *range(whole, len(tiles))]:
            held = tiles[edge : min(edge + most, whole)] or tiles[edge:]
            yield Span(held, held[0].s, held[-1].e, held[0].lo, held[-1].hi)

    def parts(self, tile: Tile) -> Iterator[Tile]:
        """The tile against its keys in equal parts of at most `part`."""
        row, s, e, lo, hi = tile
        if lo < hi <= lo + self.part:
            yield tile
            return
        count = -(-(hi - lo) // self.part)
        for index in range(count):
            yield Tile(row, s, e, *(lo + (hi - lo) * edge // count for edge in (index, index + 1)))

    def hide(self, scores: Tensor, tile: Tile) -> None:
        """Put -inf where a query sees no key. scores: (heads, g * (e - s), hi - lo), changed in place."""
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
        """i - j of a tile, (e - s, hi - lo)."""
        _, s, e, lo, hi = tile
        i = torch.arange(self.offset + s, self.offset + e, device=like.device)
        return (i[:, None] - torch.arange(lo, hi, device=like.device)).to(like.dtype)

    def _cut(self, tile: Tile) -> Tensor | None:
        """What documents and padding leave of a tile, (e - s or 1, hi - lo); None where they do not cut through it."""
        row, s, e, lo, hi = tile
        seen: Tensor | None = None
        documents, keys = self.mask.documents, self.mask.keys
        if self._starts is not None and documents is not None and lo < self._starts[row][self.offset + e - 1]:
            own = documents[row, self.offset + s : self.offset + e, None]
            seen = masks.same_document(own, documents[row, None, lo:hi])
        if self._hidden is not None and keys is not None and self._hidden[row][lo] < self._hidden[row][hi]:
            seen = keys[row, None, lo:hi] if seen is None else seen & keys[row, None, lo:hi]
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
            seen: Tensor = masks.causal(i, j) if window is None else masks.within(i, j, window)
            zeros = torch.zeros(rows, columns, dtype=like.dtype, device=like.device)
            self._triangles[key] = zeros.masked_fill_(~seen, float("-inf")).repeat(self.group, 1)
        return self._triangles[key]


def _document_starts(documents: Tensor) -> list[list[int]]:
    """For each row and key the first key of its document."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts: list[list[int]] = torch.where(begins, index, 0).cummax(dim=1).values.tolist()
    return starts


def _hidden_before(keys: Tensor) -> list[list[int]]:
    """For each row and n how many of the first n keys are padding."""
    counts: list[list[int]] = torch.nn.functional.pad((~keys).cumsum(dim=1), (1, 0)).tolist()
    return counts


def _first_real(keys: Tensor) -> list[int]:
    """For each row the first key that is a real token; the number of keys where none is."""
    first: list[int] = torch.where(keys.any(dim=1), keys.int().argmax(dim=1), keys.shape[1]).tolist()
    return first
