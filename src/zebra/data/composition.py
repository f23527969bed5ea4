"""What a mixture is made of, as tables for the terminal: its sources, and the lengths of its documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from zebra.data.mixture import Kept, Mixture

FIRST_EDGE = 256
_BAR = 16


def composition(kept: Sequence[Kept], mixture: Mixture) -> Group:
    """What each source has, what is drawn of it, and the share of the tokens by length of document in both."""
    rows = mixture.rows
    there = _table("the text", "source", "length", "documents", "tokens", "duplicates", "held out")
    drawn = _table(
        f"{len(rows):,} rows of {rows.length:,}, {rows.tokens:,} tokens", "source", "drawn", "asked", "share", "epochs"
    )
    for line in mixture.lines:
        counts = (line.documents, line.tokens, line.duplicates, line.held_out)
        there.add_row(line.source.name, line.source.bucket, *(f"{count:,}" for count in counts))
        shares = (f"{line.source.share:.2%}", f"{line.share:.2%}", f"{line.epochs:,.2f}")
        drawn.add_row(line.source.name, f"{line.drawn:,}", *shares)
    return Group(there, drawn, _by_length(kept, mixture))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in columns:
        if name == "source":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _by_length(kept: Sequence[Kept], mixture: Mixture) -> Table:
    there = np.concatenate([part.lengths for part in kept])
    of = [mixture.drawn.documents[mixture.drawn.sources == i] for i in range(len(kept))]
    # By the length of the whole document: the last of a source is cut.
    whole = np.concatenate([part.source.corpus.lengths[drawn] for part, drawn in zip(kept, of, strict=True)])
    edges = [0, FIRST_EDGE]
    while edges[-1] <= max(there):
        edges.append(edges[-1] * 2)
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
