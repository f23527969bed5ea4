"""Retrieval on a page as heat maps and tables, length across and depth down."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from zebra.report.figures import ACCENT, INK, draw, plot_cells
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.pivot import Column, Results, finite, interval_cell, pivot_table, split
from zebra.report.series import Series, labels, percent, series_of
from zebra.results import Result

HOW = (
    "The share of answers that were found, by the length of the prompt and the depth of the evidence in it: depth 0 "
    "is the beginning, 1 the end. By generation, an answer counts if the model's continuation contains it; by "
    "likelihood, if it is likelier than every wrong answer (guessing finds one in ten). Each share has its 95 % "
    "interval."
)
"""How its pictures are to be read."""
_CELLS = 11
"""Cells that fill the width of a page."""
_MOST_CELLS = 30
"""Above so many cells across they have no numbers."""
_HOT = 0.85
"""Above this share a number is dark, whatever the colour of the page."""


def retrieval(results: list[Result]) -> Section:
    """A heat map and a table for each task."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, (task, here) in enumerate(split(results, lambda one: one.task).items(), start=1):
        caption = f"{name(task)}: answers found, by length and depth{_common(here)}"
        blocks += [Figure(f"retrieval-{i}", _heat_maps(f"retrieval{i}", here), caption, here), _table(task, here)]
    return Section("Retrieval", blocks if results else [])


def retrieval_tables(results: list[Result]) -> list[Table]:
    """A table for each task, the models and layouts one after another."""
    return [_table(task, here) for task, here in split(results, lambda one: one.task).items()]


def name(task: str) -> str:
    """A task's name for people."""
    task_name, in_text, _ = task.removeprefix("retrieval-").partition("-")[2].partition("-in-text")
    return f"{task_name}{' in own text' if in_text else ''}, {scoring(task)}"


def scoring(task: str) -> str:
    """How a task is scored, for people."""
    how = task.removeprefix("retrieval-").partition("-")[0]
    return f"by {'generation' if how == 'generate' else how}"


def _common(results: Iterable[Result]) -> str:
    """The run and model of a figure, where it has one."""
    names = {f"{series.run}: {series.name}" for series in map(series_of, results)}
    return f"; {names.pop()}" if len(names) == 1 else ""


def _table(task: str, results: list[Result]) -> Table:
    names = labels(map(series_of, results))
    lines: dict[tuple[Series, float | None], list[Cell]] = {}
    for series, here in split(results, series_of).items():
        for i, depth in enumerate(_depths(here)):
            lines[series, depth] = [Cell("" if i else names[series]), Cell(_depth(depth))]
    columns = {length: Column(Cell(f"{length:,}", "tokens"), _share_cell) for length in _lengths(results)}
    counts = sorted({one.n for one in results if one.n is not None})
    samples = f", {' or '.join(f'{n:,}' for n in counts)} samples a cell" if counts else ""
    title = f"{name(task)}{_common(results)}{samples}"
    places = split(finite(results), lambda one: ((series_of(one), one.depth), one.length or 0))
    return pivot_table(title, [Cell("model"), Cell("depth")], lines, columns, places)


def _share_cell(results: Results) -> Cell:
    return interval_cell(results, partial(percent, decimals=0), lambda bound: f"{100 * bound:.0f}")


def _lengths(results: Iterable[Result]) -> list[int]:
    return sorted({one.length or 0 for one in results})


def _depths(results: Iterable[Result]) -> list[float | None]:
    return sorted({one.depth for one in results}, key=lambda depth: -1 if depth is None else depth)


def _depth(depth: float | None) -> str:
    return "all" if depth is None else f"{depth:g}"


def _heat_maps(figure: str, results: list[Result]) -> str:
    """A panel for each series, as many beside each other as have room; each cell links to its result."""
    panels = split(results, series_of)
    columns = max(len(_lengths(here)) for here in panels.values())
    lines = max(len(_depths(here)) for here in panels.values())
    beside = min(len(panels), 3 if columns <= 5 else 2 if columns <= 8 else 1)
    across = max(columns, math.ceil(_CELLS / beside))
    order = {id(one): i for i, one in enumerate(results)}
    plots = []
    for series, here in panels.items():
        title = series.layout if _common(results) else f"{series.layout}\n{series.run}: {series.name}"
        plots.append(partial(_plot_panel, results=here, title=title, size=(across, lines), beside=beside, order=order))
    return draw(figure, *plots, height=0.26 * lines + (0.9 if _common(results) else 1.05), columns=beside)


def _plot_panel(
    axes: Axes, results: list[Result], title: str, size: tuple[int, int], beside: int, order: dict[int, int]
) -> None:
    lengths, depths = _lengths(results), _depths(results)
    cells = []
    for one in results:
        x, y = lengths.index(one.length or 0), depths.index(one.depth)
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
    axes.set_xticks(range(0, len(lengths), every), [_tokens(length) for length in lengths[::every]])
    axes.set_yticks(range(len(depths)), [_depth(depth) for depth in depths])
    axes.set_title("\n".join(_cut(line, 96 // beside) for line in title.split("\n")), loc="left", fontsize=8)
    axes.set_xlabel("tokens", loc="left")
    axes.set_ylabel("depth")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
