"""The figures of a page, as SVG elements in the colour of the surrounding text."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator

from zebra.report.series import FULL, Span, buckets, interval, labels, series_of, span_name, span_of
from zebra.results import Result

INK = "#010203"
"""Stands for the colour of the text: it becomes `currentColor`, so that a figure follows light and dark mode."""
HUES = ("#e2571e", "#2a93a8", "#8b68d6", "#b8860b", "#d0488a", "#4f9d50")
ACCENT = HUES[0]

_MOST = 1e30
_WIDTH = 7.2  # inches
_LEGEND_LINE = 0.19  # inches
_MARKERS = "sD^vo"
_FEW = 4
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "lines.linewidth": 1.8,
    "text.parse_math": False,
    "figure.constrained_layout.hspace": 0.08,
    "axes.prop_cycle": cycler(marker=_MARKERS * len(HUES)) + cycler(color=HUES * len(_MARKERS)),  # 30, all different
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Figure:
    """Plots as panels of one SVG element; all share the legend of the first panel.

    Attributes:
        name: part of the file's name, and the prefix of all ids in the SVG.
        results: the results it draws; an artist whose `url` is `@2` links to the third of them.
        height: height of a row of panels, in inches.
        columns: panels in a row; all of them if None.
        widths: relative widths of the columns.
    """

    name: str
    plots: Sequence[Callable[[Axes], None]]
    caption: str = ""
    results: Sequence[Result] = ()
    height: float = 3.3
    columns: int | None = None
    widths: Sequence[float] | None = None

    @cached_property
    def svg(self) -> str:
        """The SVG element for a page."""
        columns = self.columns or len(self.plots)
        lines = math.ceil(len(self.plots) / columns)
        with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": self.name}]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing glyphs (the reader's fonts draw them), values beyond the axes
            figure = Canvas(figsize=(_WIDTH, lines * self.height), layout="constrained")
            panels = list(figure.subplots(lines, columns, squeeze=False, width_ratios=self.widths).flat)
            for axes, plot in itertools.zip_longest(panels, self.plots):
                axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
                plot(axes) if plot else axes.set_axis_off()
            handles, names = panels[0].get_legend_handles_labels()
            if names:
                ncols = max(1, min(len(names), 100 // (max(map(len, names)) + 7)))
                figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * (math.ceil(len(names) / ncols) - 1))
                style: dict[str, Any] = {"frameon": False, "borderaxespad": 0, "handlelength": 2.8}
                figure.legend(handles, names, loc="outside upper left", ncols=ncols, **style)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :].replace("xlink:href", "href").replace(' target="_blank"', "")
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
        svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{self.name}-", svg.replace(INK, "currentColor"))
        svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
        width, high = figure.get_size_inches() * 72
        return re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {high:g}">', svg, count=1).strip()

    @property
    def standalone(self) -> str:
        """The element as a file of its own, without links, in dark or light ink as the reader prefers."""
        svg = re.sub(r"</?a\b[^>]*>", "", self.svg)
        style = "<style>svg{color:#1b1b1b}@media(prefers-color-scheme:dark){svg{color:#e8e8e8}}</style>"
        return re.sub(r"<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}', svg, count=1)


def plot_positions(axes: Axes, results: Sequence[Result], named: Mapping[str, str] | None = None) -> None:
    """Plot perplexity over positions, a line for each series; up to four series also have their interval as a band.

    Args:
        results: perplexities of one task at one context length.
        named: labels of layouts in the legend, in place of the usual ones.
    """
    spans = buckets(results)
    left = spans[0][0] or spans[0][1] / 2  # a logarithmic axis has no 0
    names = labels(dict.fromkeys(map(series_of, results)))
    trained = {(series.run, series.layout) for series in names if series.trained}
    runs_with_output = {series.run for series in names if series.is_output}
    inks = itertools.cycle(("-", ":", "-."))
    full: dict[str, Any] = {"color": INK, "marker": "o"}
    cycle = itertools.cycle(matplotlib.rcParams["axes.prop_cycle"])
    styles: dict[tuple[str, str], dict[str, Any]] = {}
    for series, label in names.items():
        run_and_layout = (series.run, series.layout)
        if series.layout == FULL and not series.trained:
            style, line = full, next(inks)
        else:
            style = styles[run_and_layout] = styles.get(run_and_layout) or next(cycle)
            after = series.is_output if series.run in runs_with_output else series.trained
            line = "--" if run_and_layout in trained and not after else "-"
        scores = {span_of(one): one for one in results if series_of(one) == series}
        here = {math.sqrt(max(a, left) * b): scores[a, b] for a, b in spans if (a, b) in scores}
        if not here:  # measured over the whole context alone, beside others by position
            continue
        label = (named or {}).get(series.layout, label)
        axes.plot([*here], [drawable(one.value) for one in here.values()], line, label=label, **style)
        if len(names) <= _FEW:
            bounds = [interval(one) or (math.nan, math.nan) for one in here.values()]
            low, high = ([*map(drawable, side)] for side in zip(*bounds, strict=True))
            axes.fill_between([*here], low, high, color=style["color"], alpha=0.15, linewidth=0)
    edges = [left, *(end for _, end in spans)]
    _scale_tokens(axes, edges, [f"{spans[0][0]:,}", *(f"{edge:,}" for edge in edges[1:])])
    axes.set(xlim=(left, edges[-1]), xlabel="position (tokens of context)")
    _scale_perplexity(axes, results)


def _scale_tokens(axes: Axes, ticks: Sequence[float], texts: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, texts)
    axes.minorticks_off()


def plot_lengths(axes: Axes, lines: Mapping[str, Mapping[int, float]], threshold: float) -> None:
    """Plot shares over lengths, a line for each label, and a threshold as a dashed line."""
    for label, points in lines.items():
        axes.plot([*points], [*map(drawable, points.values())], label=label)
    axes.axhline(threshold, color=INK, linestyle="--", linewidth=1, alpha=0.6)
    ticks = sorted({length for points in lines.values() for length in points})
    _scale_tokens(axes, ticks, [f"{length:,}" for length in ticks])
    axes.set(xlabel="length (tokens)", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def plot_loss(axes: Axes, losses: list[Result], named: Mapping[str, tuple[str, str]] | None = None) -> None:
    """Plot training loss over tokens, a line for each run; `named` gives a label and a colour by run."""
    for i, run in enumerate(dict.fromkeys(loss.run for loss in losses)):
        points = {loss.n or 0: drawable(loss.value) for loss in losses if loss.run == run}
        label, color = (named or {}).get(run, (run, HUES[i % len(HUES)]))
        axes.plot([*points], [*points.values()], color=color, marker="", label=label)
    axes.set_ylabel("training loss")
    _scale_trained(axes, "tokens")


def plot_during_training(axes: Axes, points: Mapping[float, Sequence[Result]], spans: list[Span], unit: str) -> None:
    """Plot perplexity over training, a line for each span of positions."""
    for i, span in enumerate(spans, start=1):
        here = [(at, drawable(one.value)) for at, scores in points.items() for one in scores if span_of(one) == span]
        color = to_rgba(HUES[0], 0.25 + 0.75 * i / len(spans))
        axes.plot(*zip(*here, strict=True), color=color, marker="o", label=span_name(span))
    _scale_trained(axes, unit)
    _scale_perplexity(axes, [one for scores in points.values() for one in scores])


def _scale_trained(axes: Axes, unit: str) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: EngFormatter(sep="").format_eng(value).replace("G", "B"))
    axes.set_xlabel(f"{unit} trained on")


def _scale_perplexity(axes: Axes, results: Iterable[Result]) -> None:
    """Make the scale logarithmic where the values differ by more than a factor of 4."""
    axes.set_ylabel("perplexity")
    drawn = [one.value for one in results if 0 < one.value < _MOST]
    if drawn and (ratio := max(drawn) / min(drawn)) > 4:
        axes.set_yscale("log")
        axes.set_ylabel("perplexity (log scale)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 6) if ratio < 12 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()


def drawable(value: float) -> float:
    """The value if it can be drawn, else NaN: matplotlib cannot lay out ticks beyond ±1e30."""
    return value if abs(value) < _MOST else math.nan


def plot_cells(axes: Axes, columns: int, lines: int, cells: Iterable[dict[str, Any]]) -> None:
    """Draw a grid of rectangles: columns from the left and rows from the top, their centres at 0, 1, ...

    Args:
        cells: for each cell the arguments of `matplotlib.patches.Rectangle`, but `xy` is the centre, and height and
            width are 1 unless they are set.
    """
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(lines - 0.5, -0.5), xticks=[], yticks=[])
    for cell in cells:
        style: dict[str, Any] = {"width": 1.0, "height": 1.0, "linewidth": 0.0} | cell
        x, y = style.pop("xy")
        axes.add_patch(Rectangle((x - style["width"] / 2, y - style["height"] / 2), **style))
