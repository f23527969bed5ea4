"""The study's figures: quality against cost with its frontier, and perplexity beyond the trained length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from zebra.report.figures import HUES, INK
from zebra.report.series import Span, number
from zebra.study.results import ATTENTIONS, POSITIONS, StudyCell
from zebra.study.spread import Spread

COLOURS = dict(zip(ATTENTIONS, (INK, *HUES), strict=False))
SHAPES = dict(zip(POSITIONS, "o^sD", strict=True))


class Point(NamedTuple):
    """A cell in the scatter plot: its cost, its perplexity over seeds, and the height at which it is drawn."""

    cell: StudyCell
    cost: float
    quality: Spread
    height: float

    @property
    def clipped(self) -> bool:
        """Whether it is drawn below its perplexity, because that is far worse than the best."""
        return self.height < self.quality.mean


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto frontier, the cheapest point first: each point is better than all that cost no more."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.quality.mean)):
        if not best or point.quality.mean < best[-1].quality.mean:
            best.append(point)
    return best


def plot_scatter(axes: Axes, points: Sequence[Point]) -> None:
    """Plot perplexity against cost: colour by attention, shape by position embedding, the frontier as steps."""
    x, y = zip(*((point.cost, point.quality.mean) for point in frontier(points)), strict=True)
    for point in points:
        axes.errorbar(
            point.cost, point.height, None if point.clipped else point.quality.deviation, elinewidth=0.9, markersize=5,
            fmt=SHAPES[point.cell.position], color=COLOURS[point.cell.attention],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.08)
    low, high = axes.get_xlim()
    axes.step([*x, high], [*y, y[-1]], ":", where="post", color=INK, marker="", linewidth=0.9, zorder=1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set(xlabel="attention pairs for each token, all layers", ylabel="perplexity")
    kinds = [kind for kind in ATTENTIONS if any(point.cell.attention == kind for point in points)]
    positions = [name for name in POSITIONS if any(point.cell.position == name for point in points)]
    handles = [Line2D([], [], color=COLOURS[kind], marker="o", linestyle="", label=kind) for kind in kinds]
    handles += [
        Line2D([], [], color=INK, marker=SHAPES[name], markerfacecolor="none", linestyle="", label=name)
        for name in positions
    ]
    handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=":", label="frontier"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=5, frameon=False, borderaxespad=0)
    _label(axes, points)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names in a column at the right, ordered by height, each with a thin line to its point."""
    for i, point in enumerate(sorted(points, key=lambda point: (point.height, -point.cost))):
        color = COLOURS[point.cell.attention]
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": color, "relpos": (0, 0.5), "shrinkB": 3}
        label = f"{point.cell.name}, {number(point.quality.mean)}" if point.clipped else point.cell.name
        axes.annotate(
            label, (point.cost, point.height), (1.03, (i + 0.5) / len(points)), textcoords="axes fraction",
            arrowprops=line, color=color, fontsize=6.5, va="center", annotation_clip=False,
        )  # fmt: skip


class Curve(NamedTuple):
    """A name, mean perplexities by span of positions, and keyword arguments for `Axes.plot`."""

    name: str
    means: Mapping[Span, float]
    style: Mapping[str, Any]


def plot_by_position(
    axes: Axes,
    curves: Sequence[Curve],
    trained: int,
    limits: tuple[float, float],
    title: str = "",
    place: str = "position",
) -> None:
    """Plot perplexity over positions on log scales, a line for each curve; the trained length is dashed."""
    edges = sorted({edge for curve in curves for span in curve.means for edge in span if edge})
    for curve in curves:
        x = [math.sqrt(max(a, edges[0] / 2) * b) for a, b in curve.means]
        axes.plot(x, [*curve.means.values()], label=curve.name, **{"markersize": 4} | dict(curve.style))
    axes.axvline(trained, color=INK, linestyle="--", linewidth=0.8, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(edges[0] / 2, edges[-1]), yscale="log", ylim=limits, xlabel=place)
    axes.xaxis.set_major_locator(FixedLocator(edges[:: 1 + len(edges) // 6]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] > 3 * limits[0] else range(1, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_ylabel("perplexity" if axes.get_subplotspec().is_first_col() else "")  # type: ignore[union-attr]
