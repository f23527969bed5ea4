"""The rows at the end of a page, and the links of its numbers to them.

A number of one row links to `#row-17`; one that rests on several, a mean say, links to `#from-3`, which names them.
"""

from __future__ import annotations

import html as markup
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from zebra.report.series import number
from zebra.results import COLUMNS, Result

_FEW = 12
"""Of up to so many rows the value stands beside the link."""
_FIRST = ("value", "metric", "task")


class Links:
    """Where the numbers of a page link to."""

    def __init__(self, rows: Sequence[Result]) -> None:
        self._rows = rows
        self._place = {id(row): i for i, row in enumerate(rows, start=1)}
        self._several: dict[tuple[int, ...], int] = {}

    def to(self, rows: Iterable[Result]) -> str:
        """The address of what a number rests on; empty where that is no row of the page."""
        places = tuple(sorted({self._place[id(row)] for row in rows if id(row) in self._place}))
        if len(places) < 2:
            return f"#row-{places[0]}" if places else ""
        return f"#from-{self._several.setdefault(places, len(self._several) + 1)}"

    def html(self) -> str:
        """The section of rows. To be made last, when it is known what was linked to."""
        if not self._rows:
            return ""
        shared, head, body = _columns(self._rows)
        same = "; ".join(f"{name} {value}" for name, value in shared.items())
        parts = [
            '<section id="rows">\n<h2>Rows</h2>\n<p>Each number on this page links to its row, or to the rows that it '
            f"was made of.{markup.escape(f' Of all rows: {same}.') if same else ''}</p>"
        ]
        if self._several:
            lines = (f'<li id="from-{i}">{self._named(places)}</li>' for places, i in self._several.items())
            made = f"{len(self._several):,} numbers and pictures made of several rows"
            parts.append(f"<details><summary>{made}</summary>\n<ol>\n" + "\n".join(lines) + "\n</ol></details>")
        names = "".join(f"<th>{markup.escape(name)}</th>" for name in ("row", *head))
        lines = (
            f'<tr id="row-{i}"><td>{i}</td>{"".join(f"<td>{markup.escape(text)}</td>" for text in line)}</tr>'
            for i, line in enumerate(body, start=1)
        )
        parts.append(
            f"<details><summary>{len(self._rows):,} rows</summary>\n"
            f'<div class="wide"><table class="list"><thead><tr>{names}</tr></thead><tbody>\n'
            + "\n".join(lines)
            + "\n</tbody></table></div></details>\n</section>"
        )
        return "\n".join(parts)

    def _named(self, places: tuple[int, ...]) -> str:
        """The rows of a number: few with their values, many as spans of neighbours."""
        if len(places) <= _FEW:
            return ", ".join(f"{_link(i)} <small>{number(self._rows[i - 1].value)}</small>" for i in places)
        starts = [places[0], *(b for a, b in pairwise(places) if b != a + 1)]
        ends = [*(a for a, b in pairwise(places) if b != a + 1), places[-1]]
        return ", ".join(
            _link(a) if a == b else f"{_link(a)}–{_link(b, '')}" for a, b in zip(starts, ends, strict=True)
        )


def _link(place: int, word: str = "row ") -> str:
    return f'<a href="#row-{place}">{word}{place}</a>'


def _columns(rows: Sequence[Result]) -> tuple[dict[str, str], list[str], list[list[str]]]:
    """What all rows share by column, and head and body of a table of the rest."""
    shown = {name.replace("_", " "): [plain(getattr(row, name)) for row in rows] for name in (*_FIRST, *COLUMNS)}
    if any(row.origin for row in rows):
        places = [(row.origin or "").rpartition(":") for row in rows]
        shown |= {"file": [file for file, _, _ in places], "line": [line for _, _, line in places]}
    shared = {name: texts[0] for name, texts in shown.items() if len(rows) > 1 and len(set(texts)) == 1}
    varied = {name: texts for name, texts in shown.items() if name not in shared}
    shared = {name: text for name, text in shared.items() if text != "–"}
    return shared, list(varied), [list(line) for line in zip(*varied.values(), strict=True)]


def plain(value: Any) -> str:
    """A column's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "–" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
