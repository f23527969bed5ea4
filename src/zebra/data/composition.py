"""What a mixture is made of, as tables for the terminal: its sources, and the lengths of its documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from zebra.data.mixture import Kept, Mixture

FIRST_EDGE = 256
_BAR = 24


def composition(kept: Sequence[Kept], mixture: Mixture) -> Group:
    """A line for each source, then the share of the tokens by length of document, in the text and as drawn."""
    rows = mixture.rows
    table = Table(
        title=f"{len(rows):,} rows of {rows.length:,}, {rows.tokens:,} tokens",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for i, name in enumerate(
        ("source", "length", "documents", "duplicates", "held out", "tokens", "drawn", "asked", "share", "epochs")
    ):
        table.add_column(name, justify="right" if i > 1 else "left", no_wrap=True)
    for line in mixture.lines:
        counts = (line.documents, line.duplicates, line.held_out, line.tokens, line.drawn)
        shares = (f"{line.source.share:.2%}", f"{line.share:.2%}", f"{line.epochs:,.2f}")
        table.add_row(line.source.name, line.source.bucket, *(f"{count:,}" for count in counts), *shares)
    return Group(table, _by_length(kept, mixture))


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
    table = Table("tokens of a document", "in the text", "", "drawn", "", box=box.SIMPLE_HEAD)
    for column in (1, 3):
        table.columns[column].justify = "right"
    most = max(share.max() for share in shares)
    for first, last, a, b in zip(edges[:-1], edges[1:], *shares, strict=True):
        bars = ("█" * round(_BAR * share / most) for share in (a, b))
        table.add_row(f"{first:,} to {last:,}", f"{a:.1%}", next(bars), f"{b:.1%}", next(bars))
    return table
