"""Rows of a selection: what each layer is needed for, as bars and a table, and what the choice is worth elsewhere."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from zebra.report.figures import ACCENT, INK, draw
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import FULL, interval, number, series_of
from zebra.results import Result
from zebra.stripes import GLOBAL, Stripes

HOW = (
    "Each layer in turn was made local, the others left as they are in the source; its bar is what that adds to the "
    "loss of the tokens that need more than the window, in nats a token. A layer that another can replace has a small "
    "bar; greedy selection, which tries again after each layer that became local, keeps one of the two. What was "
    "chosen is measured once more on rows that took no part in the choice, beside the paper's stride at every offset."
)
"""How its pictures are to be read."""
_ORDERS = {"greedy": "measured, greedy", "once": "measured, one-shot", "stride": "stride", "local": "all local"}


_WHOLE = {
    *(("source", metric) for metric in ("layers", "loss", "held_out_loss")),
    ("candidate", "rise"),
    ("stride", "held_out_rise"),
}


class _Found(NamedTuple):
    """One selection for one budget: its rows by task and metric."""

    run: str
    name: str
    measured: str
    length: int | None
    depth: int
    rows: dict[tuple[str, str], list[Result]]

    def letters(self, layout: str) -> str:
        """G or L for each layer."""
        if layout == FULL:
            return "G" * self.depth
        kinds = Stripes.parse(layout).layer_types(self.depth)
        return "".join("G" if kind == GLOBAL else "L" for kind in kinds)

    def kept(self, row: Result) -> int:
        """How many layers of a row's layout are global."""
        return self.letters(row.layout).count("G")

    @property
    def budget(self) -> int:
        """How many layers it leaves global."""
        return self.kept(next(iter(self.chosen.values())))

    def by_budget(self) -> list[_Found]:
        """One for each number of layers that was asked for; a stride goes to the least number that it meets."""
        chosen = [row for order in ("greedy", "once") for row in self.rows[order, "held_out_rise"]]
        budgets = dict.fromkeys(map(self.kept, chosen))

        def belongs(task: str, row: Result, budget: int) -> bool:
            if task == "stride":
                return budget == min((b for b in budgets if b >= self.kept(row)), default=max(budgets))
            return task not in ("greedy", "once") or self.kept(row) == budget

        return [
            self._replace(
                rows=defaultdict(
                    list, {at: [row for row in rows if belongs(at[0], row, budget)] for at, rows in self.rows.items()}
                )
            )
            for budget in budgets
        ]

    @property
    def source(self) -> str:
        """The source's layout."""
        return self.letters(self.rows["source", "loss"][0].layout)

    @property
    def needs(self) -> dict[int, Result]:
        """What each of the source's global layers adds when it becomes local."""
        found = {}
        for row in self.rows["candidate", "rise"]:
            changed = [i for i, (a, b) in enumerate(zip(self.source, self.letters(row.layout), strict=True)) if a != b]
            if len(changed) == 1:
                found[changed[0]] = row
        return dict(sorted(found.items()))

    @property
    def chosen(self) -> dict[str, Result]:
        """The layout of each order, the one that was asked for first."""
        return {
            order: self.rows[order, "held_out_rise"][0]
            for order in ("greedy", "once")
            if self.rows[order, "held_out_rise"]
        }

    @property
    def compared(self) -> tuple[Result, Result]:
        """On the held-out rows, what was chosen and the stride that loses the least."""
        strides = self.rows["stride", "held_out_rise"]
        return next(iter(self.chosen.values())), min(strides, key=lambda row: row.value)


def selection(rows: list[Result]) -> Section:
    """A picture and two tables for each selection."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, found in enumerate(_all(rows), start=1):
        svg = draw(f"selection{i}", partial(_bars, found=found), height=2.6)
        caption = f"What each layer is needed for: {_title(found)}"
        blocks.append(Figure(f"selection-{i}", svg, caption, [*found.needs.values()]))
        blocks += [_held_out(found), _needs(found)]
    return Section("Which layers stay global", blocks if len(blocks) > 1 else [])


def selection_tables(rows: list[Result]) -> list[Table]:
    """The tables alone, for a terminal: the layers, then the comparison."""
    return [table for found in _all(rows) for table in (_needs(found), _held_out(found))]


def verdicts(rows: list[Result]) -> list[list[Cell]]:
    """A line for each selection: what its layout loses on the held-out rows, and the best stride of the paper's."""
    said = []
    for found in _all(rows):
        chosen, best = found.compared
        worth = [Cell(f"{row.value:.4f}", results=[row]) for row in (chosen, best)]
        where = f" nats a token to the loss of {found.name} on held-out rows; "
        stride = f"the paper's stride at its best offset, {best.layout}, adds "
        said.append([Cell(f"{chosen.layout} adds "), worth[0], Cell(where + stride), worth[1], Cell(".")])
    return said


def better(rows: list[Result]) -> list[str]:
    """A line for each selection whose layout a stride of the paper's beats on the held-out rows."""
    pairs = (found.compared for found in _all(rows))
    return [
        f"on the held-out rows the stride {best.layout} loses less than {chosen.layout}: {best.value:+.4f} against "
        f"{chosen.value:+.4f} nats a token. Give more samples, or take it by --stripes {best.layout}."
        for chosen, best in pairs
        if best.value < chosen.value
    ]


def _all(rows: list[Result]) -> list[_Found]:
    groups: dict[tuple[str, str, str, int | None, str], list[Result]] = defaultdict(list)
    for row in rows:
        measured = row.task.split("-", 2)[2]
        groups[row.run, row.model, measured, row.length, str(row.seed)].append(row)
    found = []
    for (run, _, measured, length, _), mine in groups.items():
        by_task: dict[tuple[str, str], list[Result]] = defaultdict(list)
        for row in mine:
            by_task[row.task.split("-", 2)[1], row.metric].append(row)
        if by_task.keys() >= _WHOLE and ("once", "held_out_rise") in by_task:
            depth = int(by_task["source", "layers"][0].value)
            whole = _Found(run, series_of(mine[0]).name, measured, length, depth, by_task)
            found += [one for one in whole.by_budget() if one.rows["stride", "held_out_rise"]]
    return found


def rest(rows: list[Result]) -> list[Result]:
    """Rows of selections that are not whole, which no picture shows."""
    shown = {id(row) for found in _all(rows) for mine in found.rows.values() for row in mine}
    return [row for row in rows if id(row) not in shown]


def _title(found: _Found) -> str:
    by = "long-range tokens" if found.measured == "text" else f"answers of {found.measured.replace('+', ', ')}"
    rows = f"{found.name}, by {by} in rows of {found.length:,} tokens"
    return f"{rows}; {found.budget} of {found.depth} layers stay global"


def _bars(axes: Axes, found: _Found) -> None:
    kept = found.letters(next(iter(found.chosen.values())).layout)
    for letter, color, label in (("G", INK, "stays global"), ("L", ACCENT, "becomes local")):
        here = {i: row for i, row in found.needs.items() if kept[i] == letter}
        values = [_finite(row.value) for row in here.values()]
        axes.bar(list(here), values, color=color, label=label, width=0.8)
    bounds = {i: bounds for i, row in found.needs.items() if (bounds := interval(row))}
    if bounds:
        axes.vlines(list(bounds), *zip(*bounds.values(), strict=True), color="#888", linewidth=1.2)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xlim(-0.6, found.depth - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_xlabel("layer")
    axes.set_ylabel("rise of the loss, nats a token")


def _finite(value: float) -> float:
    return value if abs(value) < 1e30 else math.nan


def _needs(found: _Found) -> Table:
    chosen = {order: found.letters(row.layout) for order, row in found.chosen.items()}
    head = [Cell("layer"), Cell("rise", "when local"), *(Cell(_ORDERS[order]) for order in chosen)]
    body = [
        [Cell(str(i)), _rise(row), *(Cell("global" if kinds[i] == "G" else "local") for kinds in chosen.values())]
        for i, row in found.needs.items()
    ]
    return Table(f"{found.run}: {_title(found)}", head, body)


def _held_out(found: _Found) -> Table:
    own = found.rows["source", "held_out_loss"][0]
    rows = [(_ORDERS[what], row) for what in _ORDERS for row in found.rows[what, "held_out_rise"]]

    def kept(row: Result) -> Cell:
        return Cell(str(found.kept(row)), results=[row])

    body = [[Cell("the source"), Cell(own.layout), kept(own), Cell(number(own.value), results=[own]), Cell("")]]
    for name, row in rows:
        kinds = found.letters(row.layout)
        offset = f" from layer {kinds.index('G')}" if name == _ORDERS["stride"] else ""
        loss = Cell(number(own.value + row.value), results=[own, row])
        body.append([Cell(name + offset), Cell(row.layout), kept(row), loss, _rise(row)])
    head = [Cell("held out"), Cell("layout"), Cell("global", "layers"), Cell("loss"), Cell("rise", "over the source")]
    return Table(f"{found.run}: rows that took no part in the choice, {own.n or 0:,} tokens", head, body)


def _rise(row: Result) -> Cell:
    bounds = interval(row)
    return Cell(f"{row.value:+.4f}", " to ".join(f"{bound:+.4f}" for bound in bounds) if bounds else "", results=[row])
