"""Rows of one length from documents of many: packed side by side and kept apart, or joined into long ones.

    apart    [a a a a a b b c]   positions 0 1 2 3 4 0 1 0   each document sees itself alone
    joined   [a a a a a b b c]   positions 0 1 2 3 4 5 6 7   one long document

A document longer than a row is cut at row lengths; what is left of each is packed by best fit, longest first, which
cuts no document that fits a row (arXiv 2404.10830).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zebra.errors import ZebraError

IGNORE = -100


class Documents(Protocol):
    """What is packed: the tokens of each document, and how many. A corpus is one, and what is drawn of several."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""

    def __getitem__(self, i: int) -> NDArray[np.integer[Any]]:
        """The tokens of document `i`."""


@dataclass(frozen=True)
class PackedSequences:
    """A dataset of training rows: item `i` has `input_ids`, `position_ids` and `labels`, each (length,).

    A label is the token itself, and `IGNORE` where no token of the same document comes before it, or there is padding.
    `pieces` lists (document, start, tokens), row by row; `firsts[i]` is the index of row `i`'s first piece.
    """

    documents: Documents
    length: int
    pieces: NDArray[np.int64]
    firsts: NDArray[np.int64]
    apart: bool

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        input_ids = torch.zeros(self.length, dtype=torch.long)
        labels = torch.full((self.length,), IGNORE)
        position_ids = torch.arange(self.length)
        at = 0
        for document, start, count in self.pieces[self.firsts[i] : self.firsts[i + 1]]:
            tokens = torch.from_numpy(self.documents[document][start : start + count].astype(np.int64))
            input_ids[at : at + count] = tokens
            labels[at : at + count] = tokens
            if self.apart or at == 0:
                labels[at] = IGNORE
            if self.apart:
                position_ids[at : at + count] = torch.arange(count)
            at += count
        if self.apart:
            position_ids[at:] = torch.arange(self.length - at)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    @property
    def tokens(self) -> int:
        """Tokens of text in all rows, padding not counted."""
        return int(self.pieces[:, 2].sum())


def pack(documents: Documents, length: int, *, join: bool, seed: int) -> PackedSequences:
    """Rows of `length` tokens: documents apart, or joined in an order drawn by `seed` (the last part row is dropped).

    Raises:
        ZebraError: the text is shorter than one row.
    """
    lengths = documents.lengths
    total = int(lengths.sum())
    if total < length:
        raise ZebraError(
            f"the text has {total:,} tokens, fewer than one row of {length:,}. Give more text or a shorter length."
        )
    pieces, firsts = _joined(lengths, length, seed) if join else _best_fit(lengths, length)
    return PackedSequences(documents, length, pieces, firsts, apart=not join)


def pack_whole(documents: Documents, length: int) -> PackedSequences:
    """Rows of `length` tokens with documents apart, each of them whole in one row; the last rows may be nearly empty.

    Raises:
        ZebraError: a document longer than a row.
    """
    longest = int(documents.lengths.max())
    if longest > length:
        raise ZebraError(
            f"a document has {longest:,} tokens, more than a row of {length:,}. Cut it or take longer rows."
        )
    return PackedSequences(documents, length, *_best_fit(documents.lengths, length), apart=True)


def _joined(lengths: NDArray[np.int64], row: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    rows = int(ends[-1]) // row
    # Every document and every row begins a piece; a piece ends where the next begins.
    cuts = np.union1d(np.concatenate([[0], ends]), np.arange(rows + 1) * row)
    cuts = cuts[cuts <= rows * row]
    begins, counts = cuts[:-1], np.diff(cuts)
    place = np.searchsorted(ends, begins, side="right")
    starts = begins - np.concatenate([[0], ends])[place]
    pieces = np.stack([order[place], starts, counts], axis=1).astype(np.int64)
    return pieces, np.searchsorted(begins, np.arange(rows + 1) * row).astype(np.int64)


def _best_fit(lengths: NDArray[np.int64], row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best fit, longest first: each piece goes to the fullest row that still has room for it."""
    pieces = [
        (document, start, min(row, int(count) - start))
        for document, count in enumerate(lengths)
        for start in range(0, int(count), row)
    ]
    pieces.sort(key=lambda piece: (-piece[2], piece[0], piece[1]))
    rows: list[list[tuple[int, int, int]]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for piece in pieces:
        at = bisect.bisect_left(rooms, (piece[2], -1))
        room, index = rooms.pop(at) if at < len(rooms) else (row, len(rows))
        if index == len(rows):
            rows.append([])
        rows[index].append(piece)
        if room > piece[2]:
            bisect.insort(rooms, (room - piece[2], index))
    firsts = np.cumsum([0, *(len(packed) for packed in rows)]).astype(np.int64)
    return np.array([piece for packed in rows for piece in packed], dtype=np.int64), firsts
