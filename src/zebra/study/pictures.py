"""The study's pictures: quality against cost with its frontier, and perplexity beyond the trained length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from zebra.report.figures import HUES, INK
from zebra.report.series import Span, number
from zebra.study.results import ATTENTIONS, POSITIONS, StudyCell
from zebra.study.spread import Spread

COLOURS = dict(zip(ATTENTIONS, (INK, *HUES), strict=False))
SHAPES = dict(zip(POSITIONS, "o^sD", strict=True))
_FAR = 1.25
"""Worse perplexities than this many times the best stand at the upper edge: they would press the others together."""
_REACH = 14
"""Label heights that a label may stand away from its point."""


class Point(NamedTuple):
    """A cell in the scatter: its cost, its perplexity over seeds, and where it stands if not at its perplexity."""

    cell: StudyCell
    cost: float
    quality: Spread
    clipped: float | None = None

    @property
    def height(self) -> float:
        """Where it stands."""
        return self.quality.mean if self.clipped is None else self.clipped

    @property
    def bar(self) -> float:
        """The deviation, 0 where none is drawn."""
        return (self.clipped is None and self.quality.deviation) or 0.0

    @property
    def label(self) -> str:
        """Its name, and its perplexity where it does not stand there."""
        return self.cell.name + ("" if self.clipped is None else f", {number(self.quality.mean)}")


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points than which none is both better and as cheap, from the cheapest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.quality.mean)):
        if not best or point.quality.mean < best[-1].quality.mean:
            best.append(point)
    return best


def clip(points: Sequence[Point]) -> list[Point]:
    """The points, those that are far worse than the best at the upper edge."""
    limit = _FAR * min(point.quality.mean for point in points)
    return [point._replace(clipped=limit) if point.quality.mean > limit else point for point in points]


def plot_scatter(axes: Axes, points: Sequence[Point], cost: str) -> None:
    """Colour by attention, shape by position embedding, the frontier as a staircase, a label for each point."""
    best = frontier(points)
    x = [point.cost for point in best]
    y = [point.quality.mean for point in best]
    for point in points:
        axes.errorbar(
            point.cost, point.height, point.bar or None, fmt=SHAPES[point.cell.position], markersize=5, elinewidth=0.9,
            color=COLOURS[point.cell.attention],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.08)
    low, high = axes.get_xlim()
    axes.plot([*x, high], [*y, y[-1]], drawstyle="steps-post", color=INK, linewidth=0.9, linestyle=":", zorder=1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(cost)
    axes.set_ylabel("perplexity")
    _legend(axes, points)
    _label(axes, points, best)


def _legend(axes: Axes, points: Sequence[Point]) -> None:
    kinds = [kind for kind in ATTENTIONS if any(point.cell.attention == kind for point in points)]
    positions = [name for name in POSITIONS if any(point.cell.position == name for point in points)]
    handles = [Line2D([], [], color=COLOURS[kind], marker="o", linestyle="", label=kind) for kind in kinds]
    handles += [
        Line2D([], [], color=INK, marker=SHAPES[name], markerfacecolor="none", linestyle="", label=name)
        for name in positions
    ]
    handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=":", label="frontier"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=5, frameon=False, borderaxespad=0)


def _label(axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> None:
    """Each name at the nearest free place beside its point, with a thin line to a point that is farther away."""
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # afterwards the places of all things are known
    places = {i: axes.transData.transform((p.cost, p.height)) for i, p in enumerate(points)}
    occupied = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    occupied += _lines(axes, points, best)
    inside, unit = axes.bbox, figure.dpi / 72
    for i in sorted(places, key=lambda i: (places[i][0], -places[i][1])):
        point, (x, y) = points[i], places[i]
        at: dict[str, Any] = {"xy": (point.cost, point.height), "textcoords": "offset points"}
        color = COLOURS[point.cell.attention]
        text = axes.annotate(point.label, **at, xytext=(0, 0), fontsize=6.5, color=color, va="center", in_layout=False)
        text.set_parse_math(False)
        width, height = text.get_window_extent().size
        sides = (9, -width - 9, 28, -width - 28)  # right of the point, left of it, and farther out
        offsets = sorted(
            ((dx, 1.1 * height * k) for k in range(-_REACH, _REACH + 1) for dx in sides),
            key=lambda offset: abs(offset[1]) + abs(offset[0] + width / 2) * 0.3,
        )
        boxes = [Bbox.from_bounds(x + dx, y + dy - height / 2, width, height) for dx, dy in offsets]
        free = (
            k
            for k, box in enumerate(boxes)
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if not any(box.overlaps(other) for other in occupied)
        )
        k = next(free, 0)
        dx, dy = offsets[k]
        text.set_position((dx / unit, dy / unit))
        occupied.append(boxes[k])
        if abs(dy) > 1.65 * height or abs(dx + width / 2) > 0.8 * width:
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": color, "shrinkB": 3}
            end = (dx if dx > 0 else dx + width) / unit, dy / unit
            axes.annotate("", **at, xytext=end, arrowprops=line).set_in_layout(False)


def _lines(axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> list[Bbox]:
    """Where the bars of the deviations and the steps of the frontier are."""
    ends = [*(point.cost for point in best[1:]), axes.get_xlim()[1]]
    lines = [((p.cost, p.quality.mean), (end, p.quality.mean)) for p, end in zip(best, ends, strict=True)]
    lines += [((p.cost, p.height - p.bar), (p.cost, p.height + p.bar)) for p in points]
    corners = (axes.transData.transform(line) for line in lines)
    return [Bbox.from_extents(a[0] - 1, a[1] - 1, b[0] + 1, b[1] + 1) for a, b in corners]


Lines = dict[StudyCell, dict[Span, float]]


def plot_beyond(axes: Axes, lines: Lines, trained: int, position: str, limits: tuple[float, float]) -> None:
    """Perplexity over positions for each attention under one position embedding; dashed, the trained length."""
    edges = sorted({edge for scores in lines.values() for span in scores for edge in span if edge})
    for cell, scores in lines.items():
        x = [math.sqrt(max(a, edges[0] / 2) * b) for a, b in scores]
        axes.plot(
            x, [*scores.values()], color=COLOURS[cell.attention], marker=SHAPES[position], markersize=4,
            label=cell.attention,
        )  # fmt: skip
    axes.axvline(trained, color=INK, linestyle="--", linewidth=0.8, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0] / 2, edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(edges[:: 1 + len(edges) // 6]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}")
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] > 3 * limits[0] else range(1, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_title(position, fontsize=9, loc="left")
    axes.set_ylabel("perplexity" if axes.get_subplotspec().is_first_col() else "")  # type: ignore[union-attr]
    axes.set_xlabel("position")
