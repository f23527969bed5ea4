"""A mixture of sources: of each its share of the tokens, from documents within a bucket of lengths, drawn by a seed.

    source     share   bucket            has             gives
    long         0.6   [4096, ∞)       400 tokens      600 tokens: each document once, half of them twice
    short        0.4   [0, 4096)     1,600 tokens      400 tokens: a quarter of the documents

Long documents are rare in any text, so long-context training takes more of them than there are (ProLong, arXiv
2410.02660). Documents are drawn without replacement until all have been; the last of a source is cut to its share.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zebra.data.corpus import Corpus
from zebra.data.packing import PackedSequences, pack, pack_whole
from zebra.errors import ZebraError


@dataclass(frozen=True)
class Source:
    """Documents of a corpus, those with `min_tokens <= tokens < max_tokens`, and their share of a mixture's tokens."""

    name: str
    corpus: Corpus
    share: float = 1.0
    min_tokens: int = 0
    max_tokens: int | None = None

    @property
    def bucket(self) -> str:
        """The half-open bucket of lengths, as it is printed."""
        return f"[{self.min_tokens:,}, {'∞' if self.max_tokens is None else f'{self.max_tokens:,}'})"


@dataclass(frozen=True)
class SelectedDocuments:
    """Documents of several sources, each perhaps more than once: the first `lengths[i]` tokens of document
    `documents[i]` of source `sources[i]`.
    """

    corpora: Sequence[Corpus]
    sources: NDArray[np.int64]
    documents: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __getitem__(self, i: int) -> NDArray[np.integer[Any]]:
        return self.corpora[self.sources[i]][self.documents[i]][: self.lengths[i]]

    def gathered(self) -> Corpus:
        """The same documents as a corpus of their own, in memory."""
        tokens = [self[i] for i in range(len(self.lengths))]
        return Corpus(np.concatenate(tokens), np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64))


class SourceSplit(NamedTuple):
    """The documents of a source that may be trained on, those held out, and how many were duplicates."""

    source: Source
    documents: NDArray[np.int64]
    held_out: NDArray[np.int64]
    duplicates: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document to train on."""
        return self.source.corpus.lengths[self.documents]


class SourceStats(NamedTuple):
    """What a mixture takes of a source. Tokens are counted in the packed rows, padding not counted."""

    source: Source
    documents: int
    tokens: int
    drawn: int
    share: float
    epochs: float
    duplicates: int
    held_out: int


class Mixture(NamedTuple):
    """The rows of a mixture, what was drawn for them, and a line for each source."""

    sequences: PackedSequences
    drawn: SelectedDocuments
    stats: list[SourceStats]


def split_sources(sources: Sequence[Source], *, deduplicate: bool, held_out: float = 0.0) -> list[SourceSplit]:
    """Which documents of each source are trained on.

    Of documents with the same text the first is kept, over all sources. Held out are those whose hash lies in the first
    `held_out` of all hashes: the same ones in any order, from any file, under any tokenizer.

    Raises:
        ZebraError: a source without a document in its bucket or to train on; nothing held out where something is to be.
    """
    lengths = [source.corpus.lengths for source in sources]
    inside = [
        np.flatnonzero((tokens >= source.min_tokens) & (tokens < (source.max_tokens or np.inf)))
        for source, tokens in zip(sources, lengths, strict=True)
    ]
    hashes = np.concatenate([source.corpus.hashes[i] for source, i in zip(sources, inside, strict=True)])
    first = np.full(len(hashes), not deduplicate)
    first[np.unique(hashes, return_index=True)[1]] = True
    held = hashes < np.uint64(held_out * 2**64)
    kept = []
    start = 0
    for source, i, tokens in zip(sources, inside, lengths, strict=True):
        mine, out = (mask[start : (end := start + len(i))] for mask in (first, held))
        kept.append(SourceSplit(source, i[mine & ~out], i[mine & out], int((~mine).sum())))
        start = end
        if not tokens[kept[-1].documents].any():
            raise ZebraError(
                f"the source {source.name} has no document to train on: of {len(tokens):,} documents of "
                f"{tokens.min():,} to {tokens.max():,} tokens {len(i):,} lie in {source.bucket}, "
                f"{kept[-1].duplicates:,} of them are duplicates and {len(kept[-1].held_out):,} held out. "
                "Widen the bucket, or hold out less."
            )
    if held_out and not any(len(part.held_out) for part in kept):
        raise ZebraError(f"a share of {held_out:g} holds out none of {len(hashes):,} documents. Hold out more.")
    return kept


def select(kept: Sequence[SourceSplit], *, held_out: bool = False) -> SelectedDocuments:
    """Each document that is trained on once, or each that is held out."""
    chosen = [part.held_out if held_out else part.documents for part in kept]
    return _selection(kept, chosen, [part.source.corpus.lengths[i] for part, i in zip(kept, chosen, strict=True)])


def mix(kept: Sequence[SourceSplit], rows: int, length: int, *, join: bool, seed: int, whole: bool = False) -> Mixture:
    """A mixture that fills `rows` rows of `length` tokens, or as near to it as rows with padding come from below.

    Args:
        whole: cut no document: a source ends nearest to its share with whole ones, one of them at least.

    Raises:
        ZebraError: shares that do not sum to 1; fewer rows than whole documents of each source need.
    """
    total = sum(part.source.share for part in kept)
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{part.source.share:g}" for part in kept)
        raise ZebraError(f"the shares of a mixture sum to 1; got {shares} = {total:g}. Change them.")
    tokens = rows * length
    while True:
        drawn = _draw(kept, tokens, seed, whole)
        packed = pack_whole(drawn, length) if whole else pack(drawn, length, join=join, seed=seed)
        if len(packed) <= rows:
            return Mixture(packed, drawn, _lines(kept, drawn, packed))
        if whole and tokens <= 1:
            raise ZebraError(
                f"{rows:,} rows of {length:,} tokens do not hold one whole document of each of {len(kept)} sources. "
                "Take more rows or longer ones."
            )
        tokens = max(1 if whole else length, tokens * rows // len(packed))  # documents apart leave room at row ends


def _draw(kept: Sequence[SourceSplit], tokens: int, seed: int, whole: bool) -> SelectedDocuments:
    ends = np.rint(np.cumsum([part.source.share for part in kept]) * tokens).astype(np.int64)
    documents, counts = [], []
    for part, budget in zip(kept, np.diff(ends, prepend=0), strict=True):
        lengths = part.lengths
        # By name, so that one source is drawn alike whatever stands beside it.
        rng = np.random.default_rng([seed, zlib.crc32(part.source.name.encode())])
        epochs = -(-int(budget) // int(lengths.sum()))
        order = np.concatenate([rng.permutation(len(lengths)) for _ in range(max(1, epochs))])
        sums = np.cumsum(lengths[order])
        last = int(np.searchsorted(sums, budget))
        order = order[: last + 1]
        taken = lengths[order]
        over = int(sums[last]) - int(budget)
        if not whole:
            taken[last] -= over
        elif last and 2 * over > taken[last]:
            order, taken = order[:last], taken[:last]
        documents.append(part.documents[order])
        counts.append(taken)
    return _selection(kept, documents, counts)


def _selection(
    kept: Sequence[SourceSplit], documents: Sequence[NDArray[np.int64]], lengths: Sequence[NDArray[np.int64]]
) -> SelectedDocuments:
    sources = np.repeat(np.arange(len(kept)), [len(i) for i in documents])
    return SelectedDocuments(
        [part.source.corpus for part in kept], sources, np.concatenate(documents), np.concatenate(lengths)
    )


def _lines(kept: Sequence[SourceSplit], drawn: SelectedDocuments, rows: PackedSequences) -> list[SourceStats]:
    of = drawn.sources[rows.pieces[:, 0]]
    packed = np.bincount(of, weights=rows.pieces[:, 2], minlength=len(kept)).astype(np.int64)
    lines = []
    for part, count in zip(kept, packed.tolist(), strict=True):
        there = int(part.lengths.sum())
        share, epochs = count / rows.tokens, count / there
        lines.append(
            SourceStats(
                part.source, len(part.documents), there, count, share, epochs, part.duplicates, len(part.held_out)
            )
        )
    return lines
