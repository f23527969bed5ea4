"""Pack documents of any length into sequences of one length: kept apart, or joined into long ones.

    apart    [a a a a a b b c]   positions 0 1 2 3 4 0 1 0   each document attends only to itself
    joined   [a a a a a b b c]   positions 0 1 2 3 4 5 6 7   one long document

When kept apart, a document longer than a sequence is cut at multiples of the sequence length. The pieces are packed by
best fit, longest first, which cuts no document that fits in a sequence (arXiv 2404.10830).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zebra.errors import ZebraError

IGNORE = -100
"""The label of a token that is not predicted: the default `ignore_index` of torch's cross-entropy."""


class Documents(Protocol):
    """Tokenised documents, such as a corpus: `lengths` (documents,), and document `i` of shape (lengths[i],)."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...  # noqa: D102

    def __getitem__(self, i: int) -> NDArray[np.integer[Any]]: ...


@dataclass(frozen=True)
class PackedSequences:
    """A dataset of training sequences: item `i` has `input_ids`, `position_ids` and `labels`, each (length,), int64.

    A label is the token itself, or `IGNORE` for padding and where no token of the same document comes before it.

    Attributes:
        pieces: (pieces, 3), the document, start and length of each piece, sequence by sequence.
        firsts: (sequences + 1,), the index of the first piece of each sequence, and the number of pieces.
        apart: whether positions restart at 0 with each piece.
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
        end = 0
        for document, start, count in self.pieces[self.firsts[i] : self.firsts[i + 1]]:
            begin, end = end, end + count
            input_ids[begin:end] = torch.from_numpy(self.documents[document][start : start + count].astype(np.int64))
            labels[begin:end] = input_ids[begin:end]
            if self.apart or begin == 0:
                labels[begin] = IGNORE
            if self.apart:
                position_ids[begin:end] = torch.arange(count)
        if self.apart:
            position_ids[end:] = torch.arange(self.length - end)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def take(self, which: NDArray[np.int64]) -> PackedSequences:
        """The sequences at these indices, in this order."""
        pieces = [self.pieces[self.firsts[i] : self.firsts[i + 1]] for i in which]
        firsts = np.cumsum([0, *map(len, pieces)])
        return replace(self, pieces=np.concatenate([self.pieces[:0], *pieces]), firsts=firsts)

    @property
    def tokens(self) -> int:
        """Tokens of text in all sequences, without padding."""
        return int(self.pieces[:, 2].sum())


def pack(documents: Documents, length: int, *, join: bool, seed: int) -> PackedSequences:
    """Pack documents into sequences of `length` tokens: kept apart, or joined in an order drawn with `seed`.

    When joined, the last tokens that do not fill a sequence are left out.

    Raises:
        ZebraError: the text is shorter than one sequence.
    """
    lengths = documents.lengths
    total = int(lengths.sum())
    if total < length:
        raise ZebraError(
            f"the text has {total:,} tokens, fewer than one sequence of {length:,}. Give more text or a shorter length."
        )
    pieces, firsts = _joined(lengths, length, seed) if join else _best_fit(lengths, length)
    return PackedSequences(documents, length, pieces, firsts, apart=not join)


def pack_whole(documents: Documents, length: int) -> PackedSequences:
    """Pack documents into sequences of `length` tokens, kept apart and never cut; the last may be nearly empty.

    Raises:
        ZebraError: a document is longer than a sequence.
    """
    longest = int(documents.lengths.max())
    if longest > length:
        raise ZebraError(
            f"a document has {longest:,} tokens, more than a sequence of {length:,}. Cut it or use longer sequences."
        )
    return PackedSequences(documents, length, *_best_fit(documents.lengths, length), apart=True)


def _joined(lengths: NDArray[np.int64], length: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    bounds = np.arange(int(ends[-1]) // length + 1) * length
    # A piece begins where a document or a sequence begins, and ends where the next piece begins.
    cuts = np.union1d(np.concatenate([[0], ends]), bounds)
    cuts = cuts[cuts <= bounds[-1]]
    begins, counts = cuts[:-1], np.diff(cuts)
    index = np.searchsorted(ends, begins, side="right")
    starts = begins - np.concatenate([[0], ends])[index]
    pieces = np.stack([order[index], starts, counts], axis=1).astype(np.int64)
    return pieces, np.searchsorted(begins, bounds).astype(np.int64)


def _best_fit(lengths: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best fit, longest first: each piece goes to the fullest sequence that still has room for it."""
    pieces = [
        (document, start, min(length, int(count) - start))
        for document, count in enumerate(lengths)
        for start in range(0, int(count), length)
    ]
    pieces.sort(key=lambda piece: (-piece[2], piece[0], piece[1]))
    sequences: list[list[tuple[int, int, int]]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    for piece in pieces:
        i = bisect.bisect_left(rooms, (piece[2], -1))
        room, index = rooms.pop(i) if i < len(rooms) else (length, len(sequences))
        if index == len(sequences):
            sequences.append([])
        sequences[index].append(piece)
        if room > piece[2]:
            bisect.insort(rooms, (room - piece[2], index))
    firsts = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    return np.array([piece for sequence in sequences for piece in sequence], dtype=np.int64), firsts
