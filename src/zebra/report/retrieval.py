"""Retrieval on a page as heat maps and tables: a column for each length, a row for each depth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from zebra.report.figures import ACCENT, INK, Figure, plot_cells
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import finite, interval_cell, split, table, where
from zebra.report.series import labels, percent, series_of, short_count, short_layouts, task_name
from zebra.results import Result

HOW = (
    "The share of answers found, by the length of the prompt and the depth of the evidence in it: 0 is the beginning, "
    "1 the end. By generation, an answer counts if the continuation contains it; by likelihood, if it is likelier than "
    "every wrong answer (guessing finds one in ten). Each share has its 95 % interval."
)
_CELLS = 11
"""The number of cells across that fills a page."""
_MOST_CELLS = 30
"""With more cells across than this, the cells have no numbers."""
_HOT = 0.85
"""Above this share the number in a cell is dark in dark mode too."""


def retrieval(results: list[Result]) -> Section:
    """A heat map and a table for each task."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, (task, here) in enumerate(split(results, lambda one: one.task).items(), start=1):
        caption = f"{task_name(task)}: answers found, by length and depth{_common(here)}"
        if max(len(_lengths(here)), len(_depths(here))) > 1:  # a map of one cell shows no more than the table
            blocks.append(_heat_maps(f"retrieval-{i}", caption, here))
        blocks.append(_table(here))
    return Section("Retrieval", blocks if results else [])


def _common(results: Iterable[Result]) -> str:
    """The run and model of a figure, if all results share them."""
    names = {f"; {series.run}: {series.name}" for series in map(series_of, results)}
    return names.pop() if len(names) == 1 else ""


def _lengths(results: Iterable[Result]) -> list[int]:
    return sorted({one.length or 0 for one in results})


def _depths(results: Iterable[Result]) -> dict[float | None, str]:
    """The depths in order, with their names."""
    depths = sorted({one.depth for one in results}, key=lambda depth: -1 if depth is None else depth)
    return {depth: "all" if depth is None else f"{depth:g}" for depth in depths}


def _table(results: list[Result]) -> Table:
    """A row for each depth, one model and layout after another."""
    names = labels(map(series_of, results))
    show = partial(interval_cell, text=partial(percent, decimals=0), bound=lambda bound: f"{100 * bound:.0f}")
    lines = []
    for series, here in split(results, series_of).items():
        for i, (depth, text) in enumerate(_depths(here).items()):
            at_depth = finite(one for one in here if one.depth == depth)
            lines.append(([Cell("" if i else names[series]), Cell(text)], at_depth))
    columns = [(Cell(f"{length:,}", "tokens"), where(show, length=length)) for length in _lengths(results)]
    counts = sorted({one.n for one in results if one.n is not None})
    samples = f", {' or '.join(f'{n:,}' for n in counts)} sample{'s' * (counts != [1])} a cell" if counts else ""
    title = f"{task_name(results[0].task)}{_common(results)}{samples}"
    return table(title, [Cell("model"), Cell("depth")], lines, columns)


def _heat_maps(figure: str, caption: str, results: list[Result]) -> Figure:
    """A panel for each series, as many in a row as fit; each cell links to its result."""
    panels = split(results, series_of)
    columns = max(len(_lengths(here)) for here in panels.values())
    lines = max(len(_depths(here)) for here in panels.values())
    beside = min(len(panels), 3 if columns <= 5 else 2 if columns <= 8 else 1)
    size = max(columns, math.ceil(_CELLS / beside)), lines
    order = {id(one): i for i, one in enumerate(results)}
    plots = []
    layouts = short_layouts(one.layout for one in panels)
    for series, here in panels.items():
        layout = layouts[series.layout]
        title = [layout] if _common(results) else [layout, f"{series.run}: {series.name}"]
        plots.append(partial(_plot_panel, results=here, title=title, size=size, beside=beside, order=order))
    height = 0.26 * lines + (0.9 if _common(results) else 1.05)
    return Figure(figure, plots, caption, results, height, beside)


def _plot_panel(
    axes: Axes, results: list[Result], title: list[str], size: tuple[int, int], beside: int, order: dict[int, int]
) -> None:
    lengths, depths = _lengths(results), _depths(results)
    cells = []
    for one in results:
        x, y = lengths.index(one.length or 0), [*depths].index(one.depth)
        share = min(1.0, max(0.0, one.value)) if math.isfinite(one.value) else 0.0
        cells.append(
            {"xy": (x, y), "facecolor": to_rgba(ACCENT, share), "edgecolor": to_rgba(INK, 0.18), "linewidth": 0.8}
            | {"url": f"@{order[id(one)]}"}
        )
        if size[0] * beside <= _MOST_CELLS:
            text = f"{100 * one.value:.0f}" if math.isfinite(one.value) else "–"
            color = "#1b1b1b" if share > _HOT else INK
            axes.text(x, y, text, fontsize=8, color=color, horizontalalignment="center", verticalalignment="center")
    plot_cells(axes, *size, cells)
    every = math.ceil(len(lengths) * beside / 18)
    axes.set_xticks(range(0, len(lengths), every), [*map(short_count, lengths)][::every])
    axes.set_yticks(range(len(depths)), [*depths.values()])
    most = 114 // beside
    cut = [line if len(line) <= most else line[: most - 1] + "…" for line in title]
    axes.set_title("\n".join(cut), loc="left", fontsize=8)
    axes.set_xlabel("tokens", loc="left")
    axes.set_ylabel("depth")
