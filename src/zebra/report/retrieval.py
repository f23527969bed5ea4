"""Rows of retrieval as heat maps and tables, length across and depth down."""

from __future__ import annotations

import html as markup
import math
from collections import defaultdict
from typing import NamedTuple

from zebra.report.figures import ACCENT
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import Series, interval, labels, percent, series_of
from zebra.results import Result

HOW = (
    "The share of answers that were found, by the length of the prompt and by how deep in it the evidence stands: "
    "depth 0 is its beginning, 1 its end. By generation, an answer counts where the model's continuation has it; by "
    "likelihood, where it is likelier than every wrong answer, of which a guesser finds one in ten. Beside a share "
    "stands its 95 % interval."
)
"""How its pictures are to be read."""


class _Grid(NamedTuple):
    """One task of one model and layout."""

    series: Series
    cells: dict[tuple[int, float | None], Result]

    @property
    def lengths(self) -> list[int]:
        return sorted({length for length, _ in self.cells})

    @property
    def depths(self) -> list[float | None]:
        return sorted({depth for _, depth in self.cells}, key=lambda depth: -1 if depth is None else depth)


def retrieval(rows: list[Result]) -> Section:
    """A heat map and a table for each task."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, (task, grids) in enumerate(_grids(rows).items(), start=1):
        caption = f"{name(task)}: answers found, by length and depth{_common(grids)}"
        shown = [row for grid in grids for row in grid.cells.values()]
        blocks += [Figure(f"retrieval-{i}", _picture(grids), caption, shown), _table(task, grids)]
    return Section("Retrieval", blocks if rows else [])


def retrieval_tables(rows: list[Result]) -> list[Table]:
    """A table for each task, the models and layouts one after another."""
    return [_table(task, grids) for task, grids in _grids(rows).items()]


def _grids(rows: list[Result]) -> dict[str, list[_Grid]]:
    found: dict[str, dict[Series, _Grid]] = defaultdict(dict)
    for row in rows:
        assert row.length is not None
        grid = found[row.task].setdefault(series_of(row), _Grid(series_of(row), {}))
        grid.cells[row.length, row.depth] = row
    return {task: list(grids.values()) for task, grids in found.items()}


def name(task: str) -> str:
    """A task's name for people."""
    its, in_text, _ = task.removeprefix("retrieval-").partition("-")[2].partition("-in-text")
    return f"{its}{' in own text' if in_text else ''}, {score(task)}"


def score(task: str) -> str:
    """How a task is scored, for people."""
    how = task.removeprefix("retrieval-").partition("-")[0]
    return f"by {'generation' if how == 'generate' else how}"


def _common(grids: list[_Grid]) -> str:
    """The run and model of a picture, where it has one."""
    found = {f"{grid.series.run}: {grid.series.name}" for grid in grids}
    return f"; {found.pop()}" if len(found) == 1 else ""


def _table(task: str, grids: list[_Grid]) -> Table:
    lengths = sorted({length for grid in grids for length in grid.lengths})
    head = [Cell("model"), Cell("depth"), *(Cell(f"{length:,}", "tokens") for length in lengths)]
    named = labels(grid.series for grid in grids)
    body = [
        [
            Cell("" if i else named[grid.series]),
            Cell(_depth(depth)),
            *(_score(grid.cells.get((length, depth))) for length in lengths),
        ]
        for grid in grids
        for i, depth in enumerate(grid.depths)
    ]
    counts = sorted({row.n for grid in grids for row in grid.cells.values() if row.n is not None})
    title = f"{name(task)}{_common(grids)}"
    return Table(title + (f", {' or '.join(f'{n:,}' for n in counts)} samples a cell" if counts else ""), head, body)


def _depth(depth: float | None) -> str:
    return "all" if depth is None else f"{depth:g}"


def _score(row: Result | None) -> Cell:
    if row is None or not math.isfinite(row.value):
        return Cell("–")
    bounds = interval(row)
    dim = "–".join(f"{100 * bound:.0f}" for bound in bounds) if bounds else ""
    return Cell(percent(row.value, 0), dim, results=[row])


_WIDTH, _GAP, _LEFT, _TOP, _HIGH, _BELOW = 720, 24, 42, 46, 26, 34
_WIDEST = 64
_HOT = 0.85
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:currentColor}.strong{font-weight:600}.small{font-size:11px}"
    f".found{{fill:{ACCENT}}}.hot{{fill:#1b1b1b}}.cell{{fill:none;stroke:currentColor;stroke-opacity:.18}}"
)


def _picture(grids: list[_Grid]) -> str:
    """A panel for each grid, as many beside each other as have room; each cell is a link, in the order of the rows."""
    columns = max(len(grid.lengths) for grid in grids)
    beside = min(len(grids), 3 if columns <= 5 else 2 if columns <= 8 else 1)
    width = (_WIDTH - _GAP * (beside - 1)) / beside
    several = not _common(grids)
    above = _TOP if several else _TOP - 18
    parts, y, tallest, rows = [], 0.0, 0.0, 0
    for i, grid in enumerate(grids):
        if i and i % beside == 0:
            y, tallest = y + tallest + _GAP, 0.0
        x = (width + _GAP) * (i % beside)
        parts.append(_text(x, y + 14, _cut(grid.series.layout, width), "strong"))
        if several:
            parts.append(_text(x, y + 32, _cut(f"{grid.series.run}: {grid.series.name}", width), "small"))
        parts += _panel(grid, x, y + above, width, rows)
        rows += len(grid.cells)
        tallest = max(tallest, above + _HIGH * len(grid.depths) + _BELOW)
    return f'<svg viewBox="0 0 {_WIDTH} {y + tallest:g}"><style>{_STYLE}</style>{"".join(parts)}</svg>'


def _panel(grid: _Grid, x: float, top: float, width: float, before: int) -> list[str]:
    """The cells, of which `before` came before."""
    step = min(_WIDEST, (width - _LEFT) / len(grid.lengths))
    order = {place: before + i for i, place in enumerate(grid.cells)}
    parts = []
    for j, depth in enumerate(grid.depths):
        parts.append(_text(x + _LEFT - 8, top + _HIGH * j + 17, _depth(depth), "small", "end"))
        for k, length in enumerate(grid.lengths):
            row = grid.cells.get((length, depth))
            if row is not None:
                cell = _cell(row, x + _LEFT + step * k, top + _HIGH * j, step)
                parts.append(f'<a href="@{order[length, depth]}">{cell}</a>')
    bottom = top + _HIGH * len(grid.depths)
    every = math.ceil(40 / step)
    for k, length in enumerate(grid.lengths):
        if k % every == 0:
            parts.append(_text(x + _LEFT + step * (k + 0.5), bottom + 14, _tokens(length), "small", "middle"))
    parts.append(_text(x + _LEFT - 8, bottom + 14, "depth", "small", "end"))
    return [*parts, _text(x + _LEFT + step * len(grid.lengths) / 2, bottom + 29, "tokens", "small", "middle")]


def _cell(row: Result, x: float, y: float, step: float) -> str:
    finite = math.isfinite(row.value)
    share = min(1.0, max(0.0, row.value)) if finite else 0.0
    place = f'x="{x:.4g}" y="{y:g}" width="{step:.4g}" height="{_HIGH}"'
    bounds = interval(row)
    said = f"{percent(row.value, 0) if finite else 'no number'} at {row.length:,} tokens, depth {_depth(row.depth)}"
    said += f", 95 %: {100 * bounds[0]:.0f} to {100 * bounds[1]:.0f}" if bounds else ""
    said += f", {row.n:,} samples" if row.n is not None else ""
    number = f"{100 * row.value:.0f}" if finite else "–"
    style = "small hot" if share > _HOT else "small"
    shown = _text(x + step / 2, y + 17, number, style, "middle") if step >= 22 else ""
    return (
        f"<g><title>{markup.escape(said)}</title>"
        f'<rect class="found" fill-opacity="{share:.3g}" {place}/><rect class="cell" {place}/>{shown}</g>'
    )


def _text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.5g}" y="{y:g}" text-anchor="{anchor}">{markup.escape(words)}</text>'


def _cut(words: str, width: float) -> str:
    """As many letters as have room."""
    most = int(width / 7)
    return words if len(words) <= most else words[: most - 1] + "…"


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
