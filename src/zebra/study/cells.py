"""Rows of the from-scratch study by cell: a layout of attention, a position embedding, a training length; by seed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import NamedTuple

from zebra.report.series import FULL, Span, step
from zebra.results import Result
from zebra.study.spread import Scores

ATTENTIONS = ("global", "grouped", "summary", "local", "mixed")
POSITIONS = ("rotary", "alibi", "absolute", "none")
_LAYOUT = re.compile(rf"({FULL}|[GLS]+:\d+(?:/\d+)?|\d+(?:,\d+)*:\d+) ({'|'.join(POSITIONS)})")
"""How rows name a cell's attention and position embedding: `GLLL:32 rotary`."""


class Cell(NamedTuple):
    """What was trained, whatever the seed."""

    layout: str
    position: str
    length: int

    @property
    def attention(self) -> str:
        """The kind of attention: one of ATTENTIONS."""
        letters = set("G" if self.layout == FULL else self.layout.partition(":")[0])
        if letters <= set("0123456789,"):
            return "grouped"
        alike = {"G": "global", "L": "local", "S": "summary", "GL": "grouped"}
        return alike.get("".join(sorted(letters)), "mixed")

    @property
    def name(self) -> str:
        """For people; summaries in all layers are one letter."""
        return f"{re.sub('^S+:', 'S:', self.layout)} {self.position}"


@dataclass(frozen=True)
class Study:
    """The cells of one grid.

    Attributes:
        runs: the rows of each cell and seed.
        measured: the rows of what a step costs, by `benchmarks/study.py`.
    """

    name: str
    runs: dict[Cell, dict[int | None, list[Result]]]
    measured: list[Result] = field(default_factory=list)

    @cached_property
    def _scores(self) -> dict[tuple[Cell, int, Span], dict[int | None, Result]]:
        found: dict[tuple[Cell, int, Span], dict[int | None, Result]] = defaultdict(dict)
        for cell, seeds in self.runs.items():
            for seed, rows in seeds.items():
                for row in filter(_is_score, rows):
                    found[cell, row.length or 0, (row.position_from or 0, row.position_to or 0)].setdefault(seed, row)
        return dict(found)

    def scores(self, cell: Cell, context: int, span: Span | None = None) -> Scores:
        """A cell's perplexities at the positions of a context, at all of them where None."""
        return self._scores.get((cell, context, span or (0, context)), {})

    def spans(self, context: int, cells: Sequence[Cell]) -> list[Span]:
        """The buckets of positions that any of the cells has in a context, and last the whole of it."""
        found = {s for cell, c, s in self._scores if c == context and cell in cells}
        return sorted(found, key=lambda span: (span == (0, context), span))

    def contexts(self, cell: Cell) -> list[int]:
        """The context lengths that a cell was measured at."""
        return sorted({c for other, c, _ in self._scores if other == cell})

    def far(self, cell: Cell) -> Span:
        """The last bucket of positions of the length that a cell was trained at."""
        spans = self.spans(cell.length, [cell])
        return spans[-2] if len(spans) > 1 else (0, cell.length)

    @property
    def results(self) -> list[Result]:
        """All of them."""
        return [*(row for seeds in self.runs.values() for rows in seeds.values() for row in rows), *self.measured]

    @property
    def length(self) -> int:
        """The training length of most cells."""
        counted = Counter(cell.length for cell, seeds in self.runs.items() for _ in seeds)
        return max(counted, key=lambda length: (counted[length], length))

    def cell(self, attention: str, position: str = "rotary", length: int | None = None) -> Cell | None:
        """The cell of a kind of attention: of its layouts that with the most runs, the first of those."""
        at = length or self.length
        kinds = [cell for cell in self.runs if (cell.attention, cell.length) == (attention, self.length)]
        counted = Counter(cell.layout for cell in kinds for _ in self.runs[cell])
        wanted = (Cell(layout, position, at) for layout, _ in counted.most_common())
        return next((cell for cell in wanted if cell in self.runs), None)

    def title(self, cell: Cell) -> str:
        """A cell's name, with its training length where that is not the one of most cells."""
        return cell.name + ("" if cell.length == self.length else f" at {cell.length:,}")

    def rows(self, cell: Cell, task: str, metric: str, length: int | None = None) -> list[Result]:
        """Rows of a metric, of all seeds; of a cell's own layout where a cost is told of two."""
        return [
            row
            for rows in self.runs[cell].values()
            for row in rows
            if (row.task, row.metric) == (task, metric)
            and (length is None or row.length == length)
            and row.layout.startswith(cell.layout)
        ]


def parted(rows: Sequence[Result]) -> tuple[list[Study], list[Result]]:
    """The studies in rows, and the rows that belong to none: grids, and other runs where they are two cells or more.

    A second run of the same cell and seed belongs to none.
    """
    places: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for row in rows:
        if (place := _place(row)) is not None:
            places[row.run, place].append(row)
    grids: dict[str, dict[Cell, dict[int | None, list[Result]]]] = defaultdict(lambda: defaultdict(dict))
    for (_, place), mine in places.items():
        if (cell := _cell(mine)) is not None:
            path = PurePath(place)
            name = path.parent.parent.name if path.parent.name == "cells" else ""
            grids[name][cell].setdefault(mine[0].seed, mine)
    grids = {name: runs for name, runs in grids.items() if name or len(runs) > 1}
    timed = [row for row in rows if row.task.startswith("bench ") and _LAYOUT.fullmatch(row.layout)]
    studies = [
        Study(name, dict(runs), [row for row in timed if row.run == name or len(grids) == 1])
        for name, runs in grids.items()
    ]
    taken = {id(row) for study in studies for row in study.results}
    return studies, [row for row in rows if id(row) not in taken]


def _place(row: Result) -> str | None:
    """The directory of the run that a row is of."""
    if step(row) is not None:
        return row.model.rpartition("@")[0]
    path = PurePath(row.model)
    return str(path.parent) if path.name == "model" else None


def _cell(rows: list[Result]) -> Cell | None:
    scores = [row for row in rows if _is_score(row)]
    named = next((match for row in scores if (match := _LAYOUT.fullmatch(row.layout))), None)
    if named is None:
        return None
    trained = next((row.length for row in rows if (row.task, row.metric) == ("train", "loss") and row.length), None)
    return Cell(named[1], named[2], trained or min(row.length or 0 for row in scores))


def _is_score(row: Result) -> bool:
    known = row.length and row.position_from is not None and row.position_to is not None
    return bool(known and row.task.startswith("perplexity-") and row.metric == "perplexity" and step(row) is None)
