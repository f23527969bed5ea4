"""A mixture of sources: each has a share of the tokens, taken from documents within a bucket of lengths, by a seed.

    source     share   bucket            has             gives
    long         0.6   [4096, ∞)       400 tokens      600 tokens: each document once, half of them twice
    short        0.4   [0, 4096)     1,600 tokens      400 tokens: a quarter of the documents

Long documents are rare in any text, so long-context training takes more of them than there are (ProLong, arXiv
2410.02660). Documents are drawn without replacement until all have been; the last of a source is cut to its share.
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


class SourceSplit(NamedTuple):
    """The documents of a source to train on and those held out, as indices of its corpus; how many were duplicates."""

    source: Source
    train: Ints
    held_out: Ints
    duplicates: int

    @property
    def lengths(self) -> Ints:
        """Tokens of each document to train on, (train,)."""
        return self.source.corpus.lengths[self.train]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class SelectedDocuments:
    """Documents of several sources, each perhaps more than once.

    Document `i` is the first `lengths[i]` tokens of document `documents[i]` of source `sources[i]`; each array is (n,).
    """

    corpora: Sequence[Corpus]
    sources: Ints
    documents: Ints
    lengths: Ints

    def __getitem__(self, i: int) -> NDArray[np.integer[Any]]:
        return self.corpora[self.sources[i]][self.documents[i]][: self.lengths[i]]

    def gathered(self) -> Corpus:
        """The same documents as a corpus of their own, in memory."""
        tokens = [self[i] for i in range(len(self.lengths))]
        return Corpus(np.concatenate(tokens), np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64))


class SourceStats(NamedTuple):
    """What a mixture takes of a source: `drawn` tokens, without padding, which are `share` of the mixture."""

    split: SourceSplit
    drawn: int
    share: float


class Mixture(NamedTuple):
    """The sequences of a mixture, the documents drawn for them, and statistics of each source."""

    sequences: PackedSequences
    drawn: SelectedDocuments
    stats: list[SourceStats]

    def take(self, which: Ints) -> Mixture:
        """The mixture of some of the sequences."""
        sequences = self.sequences.take(which)
        return Mixture(sequences, self.drawn, _stats([one.split for one in self.stats], self.drawn, sequences))


def split_sources(sources: Sequence[Source], *, deduplicate: bool, held_out: float = 0.0) -> list[SourceSplit]:
    """Which documents of each source are trained on, and which are held out.

    Of documents with the same text the first is used, over all sources. Held out are those whose hash lies in the first
    `held_out` of all hashes: the same ones in any order, from any file, under any tokenizer.

    Raises:
        ZebraError: a source without a document in its bucket or to train on; nothing held out where something is to be.
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
                f"{tokens.min():,} to {tokens.max():,} tokens {len(i):,} lie in {source.bucket}, "
                f"{split.duplicates:,} of them are duplicates and {len(split.held_out):,} held out. "
                "Widen the bucket, or hold out less."
            )
        splits.append(split)
    if held_out and not any(len(split.held_out) for split in splits):
        raise ZebraError(f"a share of {held_out:g} holds out none of {len(hashes):,} documents. Hold out more.")
    return splits


def select(splits: Sequence[SourceSplit], *, held_out: bool = False) -> SelectedDocuments:
    """Each document that is trained on once, or each that is held out."""
    documents = [split.held_out if held_out else split.train for split in splits]
    lengths = [split.source.corpus.lengths[i] for split, i in zip(splits, documents, strict=True)]
    return _selected(splits, documents, lengths)


def mix(
    splits: Sequence[SourceSplit], count: int, length: int, *, join: bool, seed: int, whole: bool = False
) -> Mixture:
    """A mixture that fills `count` sequences of `length` tokens, or, with padding, nearly as many.

    Args:
        splits: of sources whose shares sum to 1.
        whole: cut no document: each source gives whole documents, at least one, as near to its share as they come.

    Raises:
        ZebraError: fewer sequences than whole documents of each source need.
    """
    tokens = count * length
    while True:
        drawn = _draw(splits, tokens, seed, whole)
        sequences = pack_whole(drawn, length) if whole else pack(drawn, length, join=join, seed=seed)
        if len(sequences) <= count:
            return Mixture(sequences, drawn, _stats(splits, drawn, sequences))
        if whole and tokens <= 1:
            raise ZebraError(
                f"{count:,} sequences of {length:,} tokens do not hold one whole document of each of {len(splits)} "
                "sources. Take more sequences or longer ones."
            )
        # Documents apart leave padding, so fewer tokens fill the sequences.
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
        # By name, so that one source is drawn alike whatever other sources there are.
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
