"""The composition of training data, as tables for the terminal: sources, document lengths, kinds of conversations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table

from zebra.data.mixture import Mixture, SelectedDocuments, SourceSplit

_FIRST_EDGE = 256
_BAR_WIDTH = 16


def mixture_tables(splits: Sequence[SourceSplit], mixture: Mixture) -> Group:
    """What each source has, what is drawn of it, and the share of the tokens by document length in both."""
    sequences = mixture.sequences
    title = f"{len(sequences):,} sequences of {sequences.length:,}, {sequences.tokens:,} tokens"
    available = _table("the text", "source", "length", "documents", "tokens", "duplicates", "held out")
    drawn = _table(title, "source", "drawn", "asked", "share", "epochs")
    for stats in mixture.stats:
        counts = (stats.documents, stats.tokens, stats.duplicates, stats.held_out)
        available.add_row(stats.source.name, stats.source.bucket, *(f"{count:,}" for count in counts))
        shares = (f"{stats.source.share:.2%}", f"{stats.share:.2%}", f"{stats.epochs:,.2f}")
        drawn.add_row(stats.source.name, f"{stats.drawn:,}", *shares)
    return Group(available, drawn, _length_table(splits, mixture.drawn))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in columns:
        if name in ("source", "kind"):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _length_table(splits: Sequence[SourceSplit], drawn: SelectedDocuments) -> Table:
    available = np.concatenate([split.lengths for split in splits])
    # By the length of the whole document, even where it is cut.
    whole = np.concatenate(
        [split.source.corpus.lengths[drawn.documents[drawn.sources == i]] for i, split in enumerate(splits)]
    )
    edges = _edges(int(available.max()))
    shares = [
        np.histogram(lengths, bins=edges, weights=tokens)[0] / tokens.sum()
        for lengths, tokens in ((available, available), (whole, drawn.lengths))
    ]
    table = Table("document", "in the text", "", "drawn", "", box=box.SIMPLE_HEAD)
    for column in (0, 1, 3):
        table.columns[column].justify = "right"
    longest = max(share.max() for share in shares)
    for low, high, *both in zip(edges[:-1], edges[1:], *shares, strict=True):
        cells = (cell for share in both for cell in (f"{share:.1%}", _bar(share / longest)))
        table.add_row(f"{low:,} to {high:,}", *cells)
    return table


def _edges(longest: int) -> list[int]:
    edges = [0, _FIRST_EDGE]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    return edges


def _bar(share: float) -> str:
    return "█" * round(_BAR_WIDTH * share)


class KindStats(NamedTuple):
    """Conversations of one kind with [low, high) tokens: how many, their tokens, and those of the answers."""

    kind: str
    low: int
    high: int
    samples: int
    tokens: int
    answer_tokens: int


def kind_stats(kinds: Sequence[str], lengths: NDArray[np.int64], answers: NDArray[np.int64]) -> list[KindStats]:
    """Statistics of conversations, by kind and then by bucket of lengths: 0, 256, 512, 1024, ...

    Args:
        kinds, lengths, answers: (conversations,), of each its kind, its tokens, and those of its answers.
    """
    kind_of = np.array(kinds)
    stats = []
    for kind in dict.fromkeys(kinds):
        for low, high in itertools.pairwise(_edges(int(lengths.max(initial=0)))):
            inside = (kind_of == kind) & (lengths >= low) & (lengths < high)
            if inside.any():
                sums = (int(values[inside].sum()) for values in (inside, lengths, answers))
                stats.append(KindStats(kind, low, high, *sums))
    return stats


def kind_table(stats: Sequence[KindStats]) -> Table:
    """The statistics as a table: shares of samples and of tokens, and the answers' share of these."""
    samples, tokens, answers = (sum(column) for column in list(zip(*stats, strict=True))[3:])
    table = _table(
        f"{samples:,} conversations, {tokens:,} tokens, {answers:,} of them answers",
        *("kind", "length", "samples", "tokens", "answers"),
    )
    table.columns[0].min_width = max(len(one.kind) for one in stats)
    table.add_column("", no_wrap=True)
    previous = None
    for one in stats:
        table.add_row(
            one.kind if one.kind != previous else "",
            f"{one.low:,}+",
            f"{one.samples:,} ({one.samples / samples:.0%})",
            f"{one.tokens:,} ({one.tokens / tokens:.0%})",
            f"{one.answer_tokens / one.tokens:.0%}",
            _bar(one.tokens / max(one.tokens for one in stats)),
        )
        previous = one.kind
    return table
