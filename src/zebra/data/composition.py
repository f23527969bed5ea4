"""Tables for the terminal of what training data consist of: sources, document lengths, kinds of conversations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table

from zebra.data.mixture import Mixture

_FIRST_EDGE = 256


def mixture_tables(mixture: Mixture) -> Group:
    """Three tables: what each source has, what is drawn from it, and the share of the tokens by document length."""
    sequences, selection = mixture.sequences, mixture.drawn
    title = f"{len(sequences):,} sequences of {sequences.length:,}, {sequences.tokens:,} tokens"
    available = _table("documents by source", "source", "length", "documents", "tokens", "duplicates", "held out")
    drawn = _table(title, "source", "drawn", "requested", "share", "epochs")
    splits = [stats.split for stats in mixture.stats]
    for split, tokens, share in mixture.stats:
        source, counts = split.source, (len(split.train), split.tokens, split.duplicates, len(split.held_out))
        available.add_row(source.name, source.bucket, *(f"{count:,}" for count in counts))
        drawn.add_row(
            source.name, f"{tokens:,}", f"{source.share:.2%}", f"{share:.2%}", f"{tokens / split.tokens:,.2f}"
        )
    in_text = np.concatenate([split.lengths for split in splits])
    # A document that is cut counts in the bucket of its whole length.
    whole = np.concatenate(
        [split.source.corpus.lengths[selection.documents[selection.sources == i]] for i, split in enumerate(splits)]
    )
    edges = _edges(int(in_text.max()))
    shares_by_length = [
        np.histogram(lengths, bins=edges, weights=tokens)[0] / tokens.sum()
        for lengths, tokens in ((in_text, in_text), (whole, selection.lengths))
    ]
    by_length = _table("tokens by document length", "length", "available", "drawn")
    for (low, high), *both in zip(itertools.pairwise(edges), *shares_by_length, strict=True):
        by_length.add_row(f"{low:,} to {high:,}", *(f"{share:.1%}" for share in both))
    return Group(available, drawn, by_length)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in columns:
        if name in ("source", "kind"):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _edges(longest: int) -> list[int]:
    edges = [0, _FIRST_EDGE]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    return edges


class KindStats(NamedTuple):
    """Conversations of one kind with [low, high) tokens: their number, their tokens, and the tokens of the answers."""

    kind: str
    low: int
    high: int
    samples: int
    tokens: int
    answer_tokens: int


def kind_stats(kinds: Sequence[str], lengths: NDArray[np.int64], answers: NDArray[np.int64]) -> list[KindStats]:
    """Statistics of conversations by kind and length bucket: [0, 256), [256, 512), [512, 1024), ...

    Args:
        kinds, lengths, answers: (conversations,), the kind of each, its tokens, and the tokens of its answers.
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
    """The statistics as a table: shares of the samples and of the tokens, and the share of the tokens in answers."""
    samples, tokens, answers = (sum(column) for column in list(zip(*stats, strict=True))[3:])
    title = f"{samples:,} conversations, {tokens:,} tokens, {answers:,} of them in answers"
    table = _table(title, "kind", "length", "samples", "tokens", "answers")
    for one in stats:
        table.add_row(
            one.kind,
            f"{one.low:,}+",
            f"{one.samples:,} ({one.samples / samples:.0%})",
            f"{one.tokens:,} ({one.tokens / tokens:.0%})",
            f"{one.answer_tokens / one.tokens:.0%}",
        )
    return table
