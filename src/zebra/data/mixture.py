"""A mixture of sources: each has a share of the tokens, drawn with a seed from its documents in a bucket of lengths.

    source     share   bucket            has             gives
    long         0.6   [4096, ∞)       400 tokens      600 tokens: each document once, half of them twice
    short        0.4   [0, 4096)     1,600 tokens      400 tokens: a quarter of the documents

Long documents are rare in any text, so long-context training oversamples them (ProLong, arXiv 2410.02660). Documents
are drawn without replacement until all have been drawn, then again; the last one of a source is cut to fit its share.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zebra.data.corpus import Corpus
from zebra.data.packing import PackedSequences, pack, pack_whole
from zebra.errors import ZebraError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Documents of a corpus with `min_tokens <= tokens < max_tokens`, and their share of the tokens of a mixture."""

    name: str
    corpus: Corpus
    share: float = 1.0
    min_tokens: int = 0
    max_tokens: int | None = None

    @property
    def bucket(self) -> str:
        """The half-open bucket of lengths, as text."""
        return f"[{self.min_tokens:,}, {'∞' if self.max_tokens is None else f'{self.max_tokens:,}'})"


class SourceSplit(NamedTuple):
    """Documents of a source to train on and held-out ones, as indices into its corpus, and the number of duplicates."""

    source: Source
    train: Ints
    held_out: Ints
    duplicates: int

    @property
    def lengths(self) -> Ints:
        """The number of tokens of each document to train on, (train,)."""
        return self.source.corpus.lengths[self.train]

    @property
    def tokens(self) -> int:
        """The number of tokens to train on."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class SelectedDocuments:
    """Documents drawn from several sources; one may occur several times.

    Document `i` is the first `lengths[i]` tokens of document `documents[i]` of source `sources[i]`; each array is (n,).
    """

    corpora: Sequence[Corpus]
    sources: Ints
    documents: Ints
    lengths: Ints

    def __getitem__(self, i: int) -> NDArray[np.integer[Any]]:
        return self.corpora[self.sources[i]][self.documents[i]][: self.lengths[i]]

    def gathered(self) -> Corpus:
        """Copy the documents to a corpus of their own, in memory."""
        tokens = [self[i] for i in range(len(self.lengths))]
        return Corpus(np.concatenate(tokens), np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64))


class SourceStats(NamedTuple):
    """What a mixture takes from a source: `drawn` tokens without padding, a `share` of the mixture."""

    split: SourceSplit
    drawn: int
    share: float


class Mixture(NamedTuple):
    """The sequences of a mixture, the documents drawn for them, and statistics of each source."""

    sequences: PackedSequences
    drawn: SelectedDocuments
    stats: list[SourceStats]

    def take(self, which: Ints) -> Mixture:
        """The mixture with only the sequences at these indices."""
        sequences = self.sequences.take(which)
        return Mixture(sequences, self.drawn, _stats([one.split for one in self.stats], self.drawn, sequences))


def split_sources(sources: Sequence[Source], *, deduplicate: bool, held_out: float = 0.0) -> list[SourceSplit]:
    """Split the documents of each source into those to train on and those held out.

    With `deduplicate`, only the first of all documents with the same text is used, across all sources. A document is
    held out if its hash lies in the lowest share `held_out` of the range of hashes. So the same documents are held out
    in any order, from any file, and with any tokenizer.

    Raises:
        ZebraError: a source has no document to train on; `held_out` is above 0, but holds out nothing.
    """
    lengths = [source.corpus.lengths for source in sources]
    in_bucket = [
        np.flatnonzero((tokens >= source.min_tokens) & (tokens < (source.max_tokens or np.inf)))
        for source, tokens in zip(sources, lengths, strict=True)
    ]
    hashes = np.concatenate([source.corpus.hashes[i] for source, i in zip(sources, in_bucket, strict=True)])
    original = np.full(len(hashes), not deduplicate)
    original[np.unique(hashes, return_index=True)[1]] = True
    held = hashes < np.uint64(held_out * 2**64)
    splits: list[SourceSplit] = []
    bounds = itertools.pairwise(np.cumsum([0, *map(len, in_bucket)]))
    for source, i, tokens, (start, end) in zip(sources, in_bucket, lengths, bounds, strict=True):
        first, out = original[start:end], held[start:end]
        split = SourceSplit(source, i[first & ~out], i[first & out], int((~first).sum()))
        if not tokens[split.train].any():
            raise ZebraError(
                f"the source {source.name} has no document to train on: of {len(tokens):,} documents of "
                f"{tokens.min():,} to {tokens.max():,} tokens, {len(i):,} lie in {source.bucket}; "
                f"{split.duplicates:,} of them are duplicates and {len(split.held_out):,} held out. "
                "Widen the range from min_tokens to max_tokens, or lower held_out."
            )
        splits.append(split)
    if held_out and not any(len(split.held_out) for split in splits):
        raise ZebraError(f"held_out {held_out:g} holds out none of {len(hashes):,} documents. Raise it.")
    return splits


def select(splits: Sequence[SourceSplit], *, held_out: bool = False) -> SelectedDocuments:
    """Select each document to train on, or each held-out one, once."""
    documents = [split.held_out if held_out else split.train for split in splits]
    lengths = [split.source.corpus.lengths[i] for split, i in zip(splits, documents, strict=True)]
    return _selected(splits, documents, lengths)


def mix(
    splits: Sequence[SourceSplit], count: int, length: int, *, join: bool, seed: int, whole: bool = False
) -> Mixture:
    """Draw a mixture that fills `count` sequences of `length` tokens, or nearly as many if there is padding.

    Args:
        splits: of sources whose shares sum to 1.
        whole: cut no document: each source gives at least one, and as near to its share as whole documents come.

    Raises:
        ZebraError: as `pack` and `pack_whole`; with `whole`, a document of each source does not fit into `count`.
    """
    tokens = count * length
    while True:
        drawn = _draw(splits, tokens, seed, whole)
        sequences = pack_whole(drawn, length) if whole else pack(drawn, length, join=join, seed=seed)
        if len(sequences) <= count:
            return Mixture(sequences, drawn, _stats(splits, drawn, sequences))
        if whole and tokens <= 1:
            raise ZebraError(
                f"{count:,} sequences of {length:,} tokens cannot hold one whole document of each of {len(splits)} "
                "sources. Use more or longer sequences."
            )
        # Documents that are kept apart leave padding, so fewer tokens fill the sequences.
        tokens = max(1 if whole else length, tokens * count // len(sequences))


def _stats(splits: Sequence[SourceSplit], drawn: SelectedDocuments, sequences: PackedSequences) -> list[SourceStats]:
    source_of_piece, counts = drawn.sources[sequences.pieces[:, 0]], sequences.pieces[:, 2]
    tokens = [int(counts[source_of_piece == i].sum()) for i in range(len(splits))]
    return [SourceStats(split, n, n / sequences.tokens) for split, n in zip(splits, tokens, strict=True)]


def _draw(splits: Sequence[SourceSplit], tokens: int, seed: int, whole: bool) -> SelectedDocuments:
    ends = np.rint(np.cumsum([split.source.share for split in splits]) * tokens).astype(np.int64)
    documents, counts = [], []
    for split, budget in zip(splits, np.diff(ends, prepend=0).tolist(), strict=True):
        lengths = split.lengths
        # Seeded by name, so that the draw of a source does not depend on the other sources.
        rng = np.random.default_rng([seed, zlib.crc32(split.source.name.encode())])
        epochs = -(-budget // split.tokens)
        order = np.concatenate([rng.permutation(len(lengths)) for _ in range(max(1, epochs))])
        sums = np.cumsum(lengths[order])
        last = int(np.searchsorted(sums, budget))
        order = order[: last + 1]
        taken = lengths[order]
        excess = int(sums[last]) - budget
        if not whole:
            taken[last] -= excess
        elif last and 2 * excess > taken[last]:
            order, taken = order[:last], taken[:last]
        documents.append(split.train[order])
        counts.append(taken)
    return _selected(splits, documents, counts)


def _selected(splits: Sequence[SourceSplit], documents: Sequence[Ints], lengths: Sequence[Ints]) -> SelectedDocuments:
    sources = np.repeat(np.arange(len(splits)), [len(i) for i in documents])
    corpora = [split.source.corpus for split in splits]
    return SelectedDocuments(corpora, sources, np.concatenate(documents), np.concatenate(lengths))
