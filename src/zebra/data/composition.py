"""What a mixture is made of, as tables for the terminal: its sources, the lengths of its documents, their kinds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table

from zebra.data.mixture import Mixture, SourceSplit

FIRST_EDGE = 256
_BAR = 16


def mixture_tables(kept: Sequence[SourceSplit], mixture: Mixture) -> Group:
    """What each source has, what is drawn of it, and the share of the tokens by length of document in both."""
    rows = mixture.sequences
    there = _table("the text", "source", "length", "documents", "tokens", "duplicates", "held out")
    drawn = _table(
        f"{len(rows):,} rows of {rows.length:,}, {rows.tokens:,} tokens", "source", "drawn", "asked", "share", "epochs"
    )
    for line in mixture.stats:
        counts = (line.documents, line.tokens, line.duplicates, line.held_out)
        there.add_row(line.source.name, line.source.bucket, *(f"{count:,}" for count in counts))
        shares = (f"{line.source.share:.2%}", f"{line.share:.2%}", f"{line.epochs:,.2f}")
        drawn.add_row(line.source.name, f"{line.drawn:,}", *shares)
    return Group(there, drawn, _by_length(kept, mixture))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in columns:
        if name in ("source", "kind"):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _by_length(kept: Sequence[SourceSplit], mixture: Mixture) -> Table:
    there = np.concatenate([part.lengths for part in kept])
    of = [mixture.drawn.documents[mixture.drawn.sources == i] for i in range(len(kept))]
    # By the length of the whole document: the last of a source is cut.
    whole = np.concatenate([part.source.corpus.lengths[drawn] for part, drawn in zip(kept, of, strict=True)])
    edges = _edges(int(max(there)))
    shares = [
        np.histogram(lengths, bins=edges, weights=tokens)[0] / tokens.sum()
        for lengths, tokens in ((there, there), (whole, mixture.drawn.lengths))
    ]
    table = Table("document", "in the text", "", "drawn", "", box=box.SIMPLE_HEAD)
    for column in (0, 1, 3):
        table.columns[column].justify = "right"
    most = max(share.max() for share in shares)
    for first, last, a, b in zip(edges[:-1], edges[1:], *shares, strict=True):
        bars = ("█" * round(_BAR * share / most) for share in (a, b))
        table.add_row(f"{first:,} to {last:,}", f"{a:.1%}", next(bars), f"{b:.1%}", next(bars))
    return table


def _edges(longest: int) -> list[int]:
    edges = [0, FIRST_EDGE]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    return edges


class KindStats(NamedTuple):
    """Conversations of one kind whose tokens lie in [low, high), as often as they are drawn."""

    kind: str
    low: int
    high: int
    samples: int
    tokens: int
    answer_tokens: int


def kind_stats(kinds: Sequence[str], lengths: NDArray[np.int64], answers: NDArray[np.int64]) -> list[KindStats]:
    """What conversations are, by kind and then by bucket of lengths: 0, 256, 512, 1024, ...

    Args:
        kinds, lengths, answers: of each conversation its kind, its tokens, and those of its answers.
    """
    edges = _edges(int(lengths.max(initial=0)))
    which = np.array(kinds)
    found = []
    for kind in dict.fromkeys(kinds):
        for low, high in itertools.pairwise(edges):
            inside = (which == kind) & (lengths >= low) & (lengths < high)
            if inside.any():
                count, tokens, said = (int(of[inside].sum()) for of in (inside, lengths, answers))
                found.append(KindStats(kind, low, high, count, tokens, said))
    return found


def kind_table(found: Sequence[KindStats]) -> Table:
    """The portions as a table: shares of samples and of tokens, and of these the answers'."""
    samples, tokens = sum(one.samples for one in found), sum(one.tokens for one in found)
    table = _table(
        f"{samples:,} conversations, {tokens:,} tokens, {sum(one.answer_tokens for one in found):,} of them answers",
        *("kind", "length", "samples", "tokens", "answers"),
    )
    table.columns[0].min_width = max(len(one.kind) for one in found)
    most = max(one.tokens for one in found)
    table.add_column("", no_wrap=True)
    for i, one in enumerate(found):
        again = i > 0 and found[i - 1].kind == one.kind
        table.add_row(
            "" if again else one.kind,
            f"{one.low:,}+",
            f"{one.samples:,} ({one.samples / samples:.0%})",
            f"{one.tokens:,} ({one.tokens / tokens:.0%})",
            f"{one.answer_tokens / one.tokens:.0%}",
            "█" * round(_BAR * one.tokens / most),
        )
    return table
